"""The command that says how many workers a load needs: plan."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from crossdock.cli_files import in_folder
from crossdock.tables import console_of, table

if TYPE_CHECKING:
    from crossdock.bench.traces import Trace
    from crossdock.deploy.spec import ClusterSpec
    from crossdock.planning.plan import Option as Way
    from crossdock.planning.plan import Plan

COLUMNS = (
    "", "workers", "GPUs", "SLO met", "TTFT p99", "TPOT p99", "busy", "per million tokens",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds `crossdock plan` to the command line."""
    app.command()(plan)


def plan(
    trace: Annotated[
        Path | None,
        Argument(help="A Mooncake .jsonl or an Azure .csv trace; or --isl, --osl and --rate."),
    ] = None,
    isl: Annotated[str, Option(help="Prompt tokens: N, or LOW:HIGH uniform.")] = "",
    osl: Annotated[str, Option(help="Output tokens: N, or LOW:HIGH uniform.")] = "",
    rate: Annotated[float, Option(min=0, help="Requests a second (Poisson).")] = 0.0,
    slo: Annotated[
        str, Option(help="What is aimed at, as ttft=2s,tpot=30ms; the cluster's if unset.")
    ] = "",
    aim: Annotated[
        float, Option(min=0.01, max=1, help="Share of the requests that are to be within it.")
    ] = 0.99,
    profile: Annotated[
        str, Option(help="What a worker takes: a name, or a YAML file; else as the cluster's.")
    ] = "",
    cluster: Annotated[
        Path | None,
        Option(
            help="A cluster's YAML: policy, chunks and batches, SLO, profile; sim-8p8d if unset."
        ),
    ] = None,
    gpus: Annotated[int, Option(min=0, help="No more GPUs than this; 0: 1,024 workers.")] = 0,
    usd_per_gpu_hour: Annotated[
        float, Option(min=0, help="Price of a GPU for an hour; the profile's if unset.")
    ] = 0.0,
    kv_memory_mb: Annotated[
        int, Option(min=0, help="KV pool of a worker, MB; the profile's if unset.")
    ] = 0,
    rate_scale: Annotated[float, Option(min=0.001, help="Multiplies the trace's rate.")] = 1.0,
    limit: Annotated[int, Option(min=0, help="Only the first rows; 0 is all.")] = 0,
    jitter: Annotated[
        float, Option(min=0, max=86_400, help="Each request comes up to s seconds late.")
    ] = 0.0,
    seconds: Annotated[
        float, Option(min=1, help="With --rate: simulate so many seconds of it.")
    ] = 60.0,
    seed: Annotated[int, Option(min=0, help="Of the dice, and of --jitter.")] = 0,
    json_file: Annotated[
        Path | None,
        Option("--json", callback=in_folder, help="Write the plan to this file; - is stdout."),
    ] = None,
) -> None:
    """Find the cheapest number of prefill and decode workers that meets the SLO.

    A first guess by arithmetic, then the simulator: its policy, schedulers and pools are the
    product's. Says what co-located workers would take as well. Exit 1 where nothing meets the aim.
    """
    from crossdock.planning.plan import MOST_WORKERS, Planner, pools_of, profile_of
    from crossdock.sim.cluster import load_profile

    base = _base(cluster, slo)
    steps = load_profile(profile) if profile else profile_of(base)
    if usd_per_gpu_hour:
        steps = replace(steps, usd_per_gpu_hour=usd_per_gpu_hour)
    load = (
        _recorded(trace, rate_scale, limit, jitter, seed)
        if trace is not None
        else _steady(isl, osl, rate, seconds, seed)
    )
    if trace is not None and (isl or osl or rate):
        raise typer.BadParameter("give a trace, or --isl, --osl and --rate, not both")
    most = gpus // max(1, steps.gpus) if gpus else MOST_WORKERS
    if not most:
        raise typer.BadParameter(f"--gpus: {gpus} are not enough for a worker of {steps.gpus}")
    pools = pools_of(base, steps, kv_memory_mb)
    started = time.perf_counter()
    found = Planner(base, steps, load, pools, aim, most, seed, _say).plan()
    took_s = time.perf_counter() - started
    if json_file is None or str(json_file) != "-":
        _show(found, load, took_s)
    if json_file is not None:
        text = json.dumps(found.to_json(), indent=2) + "\n"
        if str(json_file) == "-":
            print(text, end="")
        else:
            json_file.write_text(text, encoding="utf-8")
    if found.best is None:
        raise typer.Exit(1)


def _base(cluster: Path | None, slo: str) -> ClusterSpec:
    from importlib.resources import as_file, files

    from crossdock.bench.metrics import parse_slo
    from crossdock.deploy.spec import ClusterSpec

    with as_file(files("crossdock.deploy") / "manifests" / "sim-8p8d.yaml") as packaged:
        spec = ClusterSpec.load(cluster or packaged)
    bounds = dict(parse_slo(slo))
    if bounds.keys() - {"ttft", "tpot"}:
        raise typer.BadParameter("--slo: only ttft and tpot can be planned for")
    aims = {f"{name}_ms": 1000 * seconds for name, seconds in bounds.items()}
    return replace(spec, slo=replace(spec.slo, **aims)).validate()


def _recorded(path: Path, scale: float, limit: int, jitter: float, seed: int) -> Trace:
    from crossdock.bench.traces import TraceOptions, load_trace

    return load_trace(path, TraceOptions(limit, 1 / scale, jitter, seed=seed))


def _steady(isl: str, osl: str, rate: float, seconds: float, seed: int) -> Trace:
    from crossdock.planning.plan import span, steady

    if not (isl and osl and rate):
        raise typer.BadParameter("give a trace, or --isl, --osl and --rate")
    return steady(rate, span("isl", isl), span("osl", osl), seconds, seed)


def _show(found: Plan, load: Trace, took_s: float) -> None:
    from crossdock.planning.guess import rate_of

    ways = {
        "disaggregated": found.disaggregated,
        "co-located": found.colocated,
        "nearest": found.nearest,
    }
    count, rate = len(load.requests), rate_of(load.requests)
    title = (
        f"{count} requests, {rate:.2f} a second; {found.tried} simulations in {took_s:.0f} s, from "
        f"a guess of {found.guess}"
    )
    rows = [_row(name, way) for name, way in ways.items() if way is not None]
    console_of().print(table(title, COLUMNS, rows, COLUMNS[2:]))
    best = found.best
    print(f"{found.verdict}" + (f"; best: {best.size}" if best else ""))


def _row(name: str, way: Way) -> list[str]:
    of = way.report
    busy = ", ".join(f"{pool} {share:.0%}" for pool, share in of.utilization.items())
    priced = way.usd_per_hour > 0
    cost = f"{way.usd_per_million_tokens:.2f} USD" if priced else ""
    return [
        name,
        str(way.size),
        str(way.gpus),
        f"{way.outcome.attained:.1%}",
        f"{of.ttft_p99:.3f} s",
        f"{1000 * of.tpot_p99:.1f} ms",
        busy,
        cost or f"{way.gpu_hours_per_million_tokens:.2f} GPU hours",
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
