"""Commands about who uses a cluster: keys, usage, audit."""

from __future__ import annotations

import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, BadParameter, Option

from crossdock.cli_gateway import Authority, Certificate, Target, connect
from crossdock.proto.settings import GATEWAY_ADDRESS
from crossdock.tables import console_of, table

KeyFile = Annotated[Path, Option("--file", "-f", help="The file that auth.keys names.")]

LogFiles = Annotated[
    list[Path], Argument(help="A gateway's log, audit.file with its name; rotated files are found.")
]

audits = typer.Typer(help="Check the audit log, and repeat what is in it.", no_args_is_help=True)
keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.add_typer(keys, name="keys")
    app.add_typer(audits, name="audit")
    app.command()(usage)


def _day(value: str) -> str:
    """Of an option. Raises BadParameter for what is no day."""
    try:
        return date.fromisoformat(value).isoformat() if value else ""
    except ValueError:
        raise BadParameter(f"{value!r} must be a day, as 2026-11-01") from None


def usage(
    cluster: Annotated[str, Option(help="The cluster's name, metadata.name.")] = "local",
    file: Annotated[
        Path | None, Option("--file", "-f", help="The database; the cluster's on this node.")
    ] = None,
    since: Annotated[str, Option(help="First day, as 2026-11-01.", callback=_day)] = "",
    until: Annotated[str, Option(help="Last day, as 2026-11-30.", callback=_day)] = "",
    tenant: Annotated[str, Option(help="Of one tenant alone.")] = "",
    by_day: Annotated[bool, Option("--by-day", help="A line for each day.")] = False,
    by_key: Annotated[bool, Option("--by-key", help="A line for each key.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what tenants have used, as the gateways of this node have counted it."""
    from crossdock.deploy.home import crossdock_home
    from crossdock.router.frontdoor.usage import COLUMNS, Amounts, read_usage, usage_file

    path = file or usage_file(crossdock_home(), cluster)
    if not path.exists():
        others = sorted(each.stem for each in path.parent.glob("*.db"))
        known = f"; --cluster names another: {', '.join(others)}" if others and not file else ""
        raise FileNotFoundError(f"{path}: no gateway of this cluster has kept anything here{known}")
    sums: dict[tuple[str, ...], Amounts] = {}
    for (day, who, account, model), amounts in read_usage(path, since, until or "9999").items():
        if tenant in ("", who):
            at = (who, model, *([day] * by_day), *([account] * by_key))
            sums.setdefault(at, Amounts()).__iadd__(amounts)
    names = ("tenant", "model", *["day"] * by_day, *["key"] * by_key)
    if as_json:
        rows = [dict(zip(names, at)) | amounts.plain() for at, amounts in sums.items()]
        print(json.dumps(rows, indent=2))
        return
    lines = [(*at, *(f"{value:,.6g}" for value in vars(a).values())) for at, a in sums.items()]
    shown = tuple(name.replace("_", " ") for name in COLUMNS)
    console_of().print(table("", (*names, *shown), lines, figures=set(shown)))


@keys.command("new")
def keys_new(
    tenant: Annotated[str, Option(help="Whose key it is.")],
    file: KeyFile,
    model: Annotated[
        list[str] | None, Option(help="A model that it may use; may be repeated. All if unset.")
    ] = None,
    max_priority: Annotated[
        int, Option(help="The most urgent (lowest) priority of its requests.")
    ] = 0,
    shared_cache: Annotated[
        bool, Option("--shared-cache", help="Share cached prefixes with others that do.")
    ] = False,
    metrics: Annotated[bool, Option("--metrics", help="It may read GET /metrics.")] = False,
    expires: Annotated[str, Option(help="As 2027-01-31, or with a time; UTC.")] = "",
    requests_per_minute: Annotated[int, Option(min=0, help="0: no limit.")] = 0,
    tokens_per_minute: Annotated[int, Option(min=0, help="0: no limit.")] = 0,
    max_concurrent: Annotated[int, Option(min=0, help="Sequences at once; 0: no limit.")] = 0,
    max_context_tokens: Annotated[int, Option(min=0, help="0: no limit.")] = 0,
    budget: Annotated[float, Option(min=0, help="In the currency of prices; 0: no limit.")] = 0.0,
    budget_per: Annotated[str, Option(help="day or month.")] = "month",
) -> None:
    """Make a key, add its hash to the file, and print the key: it is shown this once."""
    from crossdock.router.frontdoor.keys import add_key

    limits: dict[str, Any] = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "max_context_tokens": max_context_tokens,
        "budget": budget,
        "budget_per": budget_per if budget else "",
    }
    entry: dict[str, Any] = {
        "tenant": tenant,
        "models": model,
        "max_priority": max_priority,
        "shared_cache": shared_cache,
        "metrics": metrics,
        "expires": expires,
        "limits": {name: value for name, value in limits.items() if value},
    }
    print(add_key(file, {name: value for name, value in entry.items() if value}))


@keys.command("list")
def keys_list(file: KeyFile) -> None:
    """Show whose keys a file has. No key can be told from it."""
    from crossdock.router.config import KeyLimits
    from crossdock.router.frontdoor.keys import list_keys

    plain = vars(KeyLimits())
    rows = []
    for key in list_keys(file):
        given = {k: v for k, v in vars(key.limits).items() if v != plain[k]}
        limits = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                           for name, value in given.items())  # fmt: skip
        expires = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.expires)) if key.expires else ""
        cache = "shared" if key.shared_cache else "private"
        models = ", ".join(sorted(key.models)) or "all"
        metrics = "may read" if key.metrics else ""
        about = (key.key_id, key.tenant, models, key.max_priority, cache, metrics)
        rows.append((*about, limits, expires))
    columns = ("key", "tenant", "models", "priority", "cache", "metrics", "limits", "expires (UTC)")
    console_of().print(table("", columns, rows))


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, Argument(help="As crossdock keys list shows it.")], file: KeyFile
) -> None:
    """Take a key out of the file: gateways refuse it within a second."""
    from crossdock.router.frontdoor.keys import revoke_key

    revoke_key(file, key_id)
    print(f"revoked {key_id}", file=sys.stderr)


@audits.command("verify")
def audit_verify(
    files: LogFiles,
    key: Annotated[
        list[str] | None, Option(help="A public key that may have signed it; any if unset.")
    ] = None,
    partial: Annotated[
        bool, Option("--partial", help="Its oldest files may have been deleted.")
    ] = False,
) -> None:
    """Find every line that was changed, moved or taken out since it was written; exit 1 then."""
    from crossdock.router.frontdoor.audit_chain import in_order, verify

    whole = True
    _check_there(files)
    for file in files:
        found = verify(in_order([file]), key or (), partial)
        whole &= not found.wrong
        for line in found.wrong:
            print(f"error: {line}", file=sys.stderr)
        state = "whole" if not found.wrong else "NOT whole"
        print(f"{file}: {state}: {found.lines} lines, {found.requests} requests")
        for signer in found.keys:
            print(f"  signed by {signer}")
    if not whole:
        raise typer.Exit(1)


@audits.command("replay")
def audit_replay(
    request_id: Annotated[str, Argument(help="The request's id.")],
    files: LogFiles,
    target: Target = GATEWAY_ADDRESS,
    ca: Authority = "",
    cert: Certificate = "",
    tenant: Annotated[
        str | None, Option(help="Whose request; of several by this id the newest is taken.")
    ] = None,
    timeout: Annotated[float, Option(help="Seconds.")] = 600.0,
) -> None:
    """Compute a request again, and compare its tokens with those in the log; exit 1 where they
    differ. Needs audit.prompts: keep."""
    from crossdock.audit_replay import replay
    from crossdock.router.frontdoor.audit_chain import find_request, in_order

    _check_there(files)
    line = find_request(in_order(files), request_id, tenant)
    with connect(target, ca, cert) as client:
        differences = replay(line, client, timeout)
    for difference in differences:
        print(f"error: {difference}", file=sys.stderr)
    if differences:
        raise typer.Exit(1)
    tokens = sum(choice["tokens"] for choice in line["choices"])
    whose = f"{request_id}, line {line['n']}, of {line['tenant'] or 'no tenant'}"
    print(f"{whose}: the same {tokens} tokens")


def _check_there(files: list[Path]) -> None:
    """Raises FileNotFoundError naming the logs that may be meant."""
    for file in files:
        if not file.exists():
            gateways = sorted(file.parent.glob(f"{file.name}.*.head"))
            meant = " or ".join(str(each.with_suffix("")) for each in gateways)
            do = f"; each gateway has its own: {meant}" if meant else ""
            raise FileNotFoundError(f"{file}: there is no such log{do}")
