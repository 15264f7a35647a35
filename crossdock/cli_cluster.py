"""Commands for who runs a cluster: up, status, explain, doctor, apply, scale, down, model."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from crossdock.proto.settings import CONTROLLER_ADDRESS
from crossdock.tables import console_of, table

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console

    from crossdock.proto.v1 import admin_pb2, worker_pb2

FIGURES = ("queue", "running", "KV used", "cached", "total", "hit rate", "leases")
SHOWN_DECISIONS = 5
SHOWN_LEASES = 20

Address = Annotated[
    str, Option(envvar="CROSSDOCK_ADMIN", help="The controller's address, host:port.")
]
CredentialFile = Annotated[
    Path | None,
    Option(
        envvar="CROSSDOCK_CREDENTIAL",
        help="The operator's credential; the one that CROSSDOCK_HOME has of that cluster if unset.",
    ),
]
Wait = Annotated[bool, Option(help="Return once the cluster is as asked.")]
WaitTimeout = Annotated[float, Option(min=0, help="Longest wait in seconds.")]

models = typer.Typer(help="Fetch, inspect and export models.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands about clusters and models to the command line."""
    for command in (up, status, explain, doctor, apply, scale, down):
        app.command()(command)
    app.add_typer(models, name="model")


def up(
    file: Annotated[
        Path | None,
        Argument(help="The cluster's YAML; one prefill and one decode worker on CPU if unset."),
    ] = None,
    address: Annotated[
        str | None, Option(help="A running Ray cluster to join; starts a local one if unset.")
    ] = None,
) -> None:
    """Start a cluster and keep it up until Ctrl-C or SIGTERM, which stop all of it."""
    from importlib.resources import as_file, files

    from crossdock.deploy.up import up as up_local

    packaged = files("crossdock.deploy") / "manifests" / "local-cpu.yaml"
    with as_file(packaged) as default:
        code = up_local(file or default, address=address)
    raise typer.Exit(code or 0)


def status(
    address: Address = CONTROLLER_ADDRESS,
    as_json: Annotated[bool, Option("--json", help="Print all that is known as JSON.")] = False,
    check: Annotated[
        bool, Option("--check", help="Account for every KV block; exit 1 unless all is well.")
    ] = False,
    credential: CredentialFile = None,
) -> None:
    """Show workers, gateways and the newest decisions of the controller."""
    from crossdock.deploy import admin

    cluster = admin.status(address, check_integrity=check, credential=credential)
    if as_json:
        print(_json(cluster))
    else:
        show_status(cluster, console_of())
    if check and (wrong := what_is_wrong(cluster)):
        for line in wrong:
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(1)


def explain(
    request_id: Annotated[
        str, Argument(help="X-Request-Id, or the id of the answer: chatcmpl-…, cmpl-…, resp_…")
    ],
    address: Address = CONTROLLER_ADDRESS,
    as_json: Annotated[bool, Option("--json", help="Print all that is known as JSON.")] = False,
    credential: CredentialFile = None,
) -> None:
    """Show where a request went and why, what was predicted of it, and what it took."""
    from crossdock import explanation
    from crossdock.deploy import admin

    found = admin.explain(request_id, address, credential=credential)
    if as_json:
        print(_json(found))
    else:
        explanation.show(found, console_of())


def doctor(
    address: Address = CONTROLLER_ADDRESS,
    as_json: Annotated[bool, Option("--json", help="Print what was found as JSON.")] = False,
    at_once: Annotated[
        int, Option(min=1, help="Pairs measured at the same time, no worker in two of them.")
    ] = 1,
    credential: CredentialFile = None,
) -> None:
    """Check clocks, versions and layouts of all workers, how KV moves in every pair, and which
    ports are open wider than they must be.

    Exit 1 where something is wrong, with a line for each problem that says what to do.
    """
    from crossdock import doctor
    from crossdock.deploy import admin, credentials

    status = admin.status(address, listening=True, credential=credential)
    proof = credentials.find(address, credential)
    report = doctor.examine(status, at_once, address, proof)
    if as_json:
        print(json.dumps(doctor.as_json(report), indent=2))
    else:
        doctor.show(report, console_of())
    findings = report.findings
    for finding in findings:
        print(f"{'error' if finding.problem else 'warning'}: {finding}", file=sys.stderr)
    if any(finding.problem for finding in findings):
        raise typer.Exit(1)
    if not as_json:
        print(f"sound: {len(report.workers)} workers, {len(report.pairs)} pairs")


def apply(
    file: Annotated[Path, Argument(help="The cluster's YAML.")],
    address: Annotated[
        str, Option(envvar="CROSSDOCK_ADMIN", help="The controller; the file's own if unset.")
    ] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Only show what would be done.")] = False,
    wait: Wait = True,
    timeout: WaitTimeout = 300.0,
    generation: Annotated[
        int, Option(min=0, help="Refuse unless the spec is of this generation; see status.")
    ] = 0,
    credential: CredentialFile = None,
) -> None:
    """Make the running cluster what the file says; workers that go are drained first."""
    from crossdock.deploy import admin

    reply = admin.apply(file, address, dry_run, wait, timeout, generation, _waiting, credential)
    _show_actions(reply, wait and not dry_run, timeout)


def scale(
    pool: Annotated[str, Argument(help="A pool of the cluster, as prefill or decode.")],
    replicas: Annotated[int, Argument(min=0, help="How many workers it is to have.")],
    address: Address = CONTROLLER_ADDRESS,
    wait: Wait = True,
    timeout: WaitTimeout = 300.0,
    credential: CredentialFile = None,
) -> None:
    """Set the size of one pool."""
    from crossdock.deploy import admin

    reply = admin.scale(pool, replicas, address, wait, timeout, _waiting, credential)
    _show_actions(reply, wait, timeout)


def down(
    address: Address = CONTROLLER_ADDRESS,
    drain: Annotated[
        float, Option(min=0, help="Seconds that running requests get to finish.")
    ] = 30.0,
    credential: CredentialFile = None,
) -> None:
    """Stop the cluster: no new requests, running ones finish, then every process goes."""
    from crossdock.deploy import admin

    admin.down(address, drain_s=drain, credential=credential)
    print("down")


def _json(message: Message) -> str:
    from google.protobuf.json_format import MessageToDict

    shown = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(shown, indent=2)


def _show_actions(reply: admin_pb2.ApplyResponse, waited: bool, timeout: float) -> None:
    for action in reply.actions:
        print(action)
    if not reply.actions:
        print("nothing to start or stop")
    if waited and not reply.converged:
        why = "; ".join(reply.hopeless or reply.waiting_for)
        after = "" if reply.hopeless else f" after {timeout:g} s"
        raise TimeoutError(f"the cluster is not as asked{after}: {why}; see crossdock status")


def _waiting(line: str) -> None:
    print(f"waiting: {line}", file=sys.stderr)


@models.command("fetch")
def model_fetch(
    model_id: Annotated[str, Argument(help="A known model; see crossdock model list.")],
) -> None:
    """Download a known model, check its digest and keep it under CROSSDOCK_HOME."""
    from crossdock.deploy.home import crossdock_home
    from crossdock.model import store

    print(store.fetch(model_id, crossdock_home(), progress=partial(print, file=sys.stderr)))


@models.command("list")
def model_list() -> None:
    """Models that are known by name, and whether they are here."""
    from crossdock.deploy.home import crossdock_home
    from crossdock.model import store
    from crossdock.proto.errors import ModelError

    rows = []
    for name, model in store.KNOWN_MODELS.items():
        try:
            here = str(store.resolve(name, crossdock_home()).path)
        except ModelError:
            here = f"no: crossdock model fetch {name}"
        rows.append((name, f"{model.size / 1e6:.0f} MB", here))
    console_of().print(table("", ("model", "size", "here"), rows))


@models.command("show")
def model_show(
    model: Annotated[str, Argument(help="A known model, a folder or a .gguf file.")],
) -> None:
    """What a model is: its shape, context and digest."""
    from dataclasses import asdict

    from crossdock.deploy.home import crossdock_home
    from crossdock.model import store
    from crossdock.model.config import load_config

    files = store.resolve(model, crossdock_home())
    facts = {
        "model": files.model_id,
        "path": files.path,
        "format": files.format,
        "digest": files.digest,
        **asdict(load_config(files)),
    }
    for name, value in facts.items():
        print(f"{name:<20} {value}")


@models.command("export")
def model_export(
    model: Annotated[str, Argument(help="A known model, a folder or a .gguf file.")],
    folder: Annotated[Path, Argument(help="Where to; a new or an empty folder.")],
    dtype: Annotated[
        str, Option(help="Of the weights: float32, bfloat16, float16, or auto: the model's own.")
    ] = "auto",
    force: Annotated[
        bool, Option("--force", help="Replace the model that the folder holds.")
    ] = False,
) -> None:
    """Write a model as a Hugging Face folder, which transformers and vLLM load."""
    from crossdock.deploy.home import crossdock_home
    from crossdock.model.export import export_model

    say = partial(print, file=sys.stderr)
    print(export_model(model, folder, crossdock_home(), dtype, force=force, progress=say))


def show_status(cluster: admin_pb2.ClusterStatus, console: Console) -> None:
    """Prints the members as a table."""
    as_specified = "as specified" if cluster.converged else "changing"
    generation = f"generation {cluster.generation}  {as_specified}"
    console.print(f"cluster [bold]{cluster.name}[/bold]  model {cluster.model}  {generation}")
    several = any(member.model for member in cluster.workers)
    left = ("worker", "pool", *["model"] * several, "role", "state", "node")
    figures = (*FIGURES, "restarts")
    rows = [_worker_row(member, several) for member in cluster.workers]
    console.print(table("workers", left + figures, rows, figures))
    gateways = [(g.name, g.state, g.grpc, g.http, g.active_requests) for g in cluster.gateways]
    columns = ("gateway", "state", "gRPC", "HTTP", "active")
    console.print(table("gateways", columns, gateways, figures={"active"}))
    _show_autoscaled(cluster, console)
    _show_leases(cluster, console)
    for line in cluster.waiting_for:
        console.print(line, markup=False, style="red")
    for decision in list(cluster.decisions)[-SHOWN_DECISIONS:]:
        at = time.strftime("%H:%M:%S", time.localtime(decision.unix_s))
        console.print(f"{at}  {decision.action}: {decision.reason}", markup=False)


def _show_autoscaled(cluster: admin_pb2.ClusterStatus, console: Console) -> None:
    """What the autoscaler wants of each of its pools, and why."""
    if not cluster.autoscaled:
        return
    figures = ("least", "most", "floor", "keep", "target")
    rows = [
        (each.pool, *(getattr(each, name) for name in figures), each.reason)
        for each in cluster.autoscaled
    ]
    dry_run = " (dry run)" if cluster.autoscaled[0].dry_run else ""
    columns = ("pool", *figures, "because")
    console.print(table(f"autoscaled pools{dry_run}", columns, rows, figures))


def _worker_row(member: admin_pb2.MemberStatus, several: bool) -> tuple[object, ...]:
    from crossdock.proto.convert import ROLE_FROM_PB

    role = ROLE_FROM_PB.get(member.role, "")
    place = (member.name, member.pool, *[member.model] * several)
    known = (*place, role, member.state, member.node_id[:8])
    figures = _figures(member.worker) if member.HasField("worker") else [""] * len(FIGURES)
    return (*known, *figures, member.restarts)


def _figures(worker: worker_pb2.WorkerStatus) -> list[object]:
    """Those of FIGURES."""
    load = worker.load
    hits = worker.cached_tokens / worker.prompt_tokens if worker.prompt_tokens else 0.0
    blocks = [worker.used_blocks, load.cached_blocks, load.total_blocks]
    return [load.waiting, load.running, *blocks, f"{hits:.1%}", len(worker.leases)]


def _show_leases(cluster: admin_pb2.ClusterStatus, console: Console) -> None:
    """Who has pinned KV blocks, and for how long: the oldest first."""
    leases = [(member.name, lease) for member in cluster.workers for lease in member.worker.leases]
    if not leases:
        return
    leases.sort(key=lambda each: each[1].age_s, reverse=True)
    rows = [
        (name, of.sequence_id, of.owner, of.blocks, f"{of.age_s:.1f} s", f"{of.remaining_s:.1f} s")
        for name, of in leases[:SHOWN_LEASES]
    ]
    figures = ("blocks", "age", "left")
    console.print(table("open leases", ("worker", "sequence", "owner", *figures), rows, figures))
    if len(leases) > SHOWN_LEASES:
        console.print(f"… and {len(leases) - SHOWN_LEASES} more")


def what_is_wrong(cluster: admin_pb2.ClusterStatus) -> list[str]:
    """One line for each thing that keeps the cluster from being well and as specified."""
    wrong = [] if cluster.converged else ["the cluster is not what its spec says"]
    for member in cluster.workers:
        if not member.HasField("worker"):
            wrong.append(f"{member.name} does not answer")
        elif member.worker.integrity_error:
            wrong.append(f"{member.name}: {member.worker.integrity_error}")
    return [*wrong, *cluster.waiting_for]
