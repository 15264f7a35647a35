"""Commands about who uses a cluster: keys."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from crossdock.tables import console_of, table

KeyFile = Annotated[Path, Option("--file", "-f", help="The file that auth.keys names.")]

keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.add_typer(keys, name="keys")


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
        rows.append((key.key_id, key.tenant, models, key.max_priority, cache, limits, expires))
    columns = ("key", "tenant", "models", "priority", "cache", "limits", "expires (UTC)")
    console_of().print(table("", columns, rows))


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, Argument(help="As crossdock keys list shows it.")], file: KeyFile
) -> None:
    """Take a key out of the file: gateways refuse it within a second."""
    from crossdock.router.frontdoor.keys import revoke_key

    revoke_key(file, key_id)
    print(f"revoked {key_id}", file=sys.stderr)
