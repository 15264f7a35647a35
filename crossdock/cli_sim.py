"""The command that replays a trace on a simulated cluster: sim."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from crossdock.cli_files import in_folder
from crossdock.proto.errors import ConfigError
from crossdock.tables import console_of, table

if TYPE_CHECKING:
    from crossdock.deploy.spec import ClusterSpec
    from crossdock.sim.report import SimReport

COLUMNS = (
    "policy", "requests/s", "SLO met", "goodput/s", "TTFT p50", "p90", "p99", "TPOT mean", "p99",
    "hit rate", "failed", "busy",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds `crossdock sim` to the command line."""
    app.command()(sim)


def sim(
    trace: Annotated[Path, Argument(help="A Mooncake .jsonl or an Azure .csv trace.")],
    cluster: Annotated[Path, Option(help="The cluster's YAML file.")],
    policy: Annotated[
        list[str] | None, Option(help="A placement policy; several are compared. The file's.")
    ] = None,
    profile: Annotated[
        str, Option(help="What steps take: a name, or a YAML file; else as the file's engines say.")
    ] = "",
    rate_scale: Annotated[
        list[float] | None, Option(help="Multiplies the trace's rate; several are tried.")
    ] = None,
    limit: Annotated[int, Option(min=0, help="Only the first rows; 0 is all.")] = 0,
    jitter: Annotated[
        float, Option(min=0, max=86_400, help="Each request comes up to s seconds late.")
    ] = 0.0,
    seed: Annotated[int, Option(min=0, help="Of the dice, and of --jitter.")] = 0,
    json_file: Annotated[
        Path | None,
        Option("--json", callback=in_folder, help="Write the reports to this file, as a list."),
    ] = None,
    html_file: Annotated[
        Path | None,
        Option(
            "--html", callback=in_folder, help="Write a page with plots over time to this file."
        ),
    ] = None,
) -> None:
    """Replay a trace on a cluster of virtual time: its own router, schedulers and block pools."""
    from crossdock.bench.traces import TraceOptions, load_trace
    from crossdock.deploy.spec import ClusterSpec
    from crossdock.sim.cluster import SimCluster, load_profile
    from crossdock.sim.page import page, run_of
    from crossdock.sim.report import report
    from crossdock.sim.samples import Samples

    spec = ClusterSpec.load(cluster)
    specs = [(name, _with_policy(spec, name)) for name in policy or [spec.gateway.policy]]
    steps = load_profile(profile) if profile else None
    reports: list[SimReport] = []
    shown: list[dict[str, Any]] = []  # of the page
    started = time.perf_counter()
    scales = rate_scale or [1.0]
    for scale in scales:
        if not 0 < scale < math.inf:
            raise ConfigError("--rate-scale", f"{scale:g} must be above 0 and finite")
    for scale in scales:
        options = TraceOptions(limit=limit, time_scale=1 / scale, jitter_s=jitter, seed=seed)
        replayed = load_trace(trace, options)
        for name, chosen in specs:
            simulated = SimCluster(chosen, steps, seed)
            samples = Samples(simulated, replayed) if html_file is not None else None
            simulated.run(replayed)
            reports.append(report(name, simulated, chosen.slo))
            if samples is not None:
                told = reports[-1]
                shown.append(run_of(scale, told, _row(told), simulated, samples))
    about = f"{trace.name}: {reports[0].requests} requests"
    title = f"{about}, simulated in {time.perf_counter() - started:.1f} s"
    console_of().print(table(title, COLUMNS, map(_row, reports), figures=COLUMNS[1:]))
    if json_file is not None:
        listed = [each.to_json() for each in reports]
        json_file.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    if html_file is not None:
        html_file.write_text(page(f"{about} on {cluster.name}", COLUMNS, shown), encoding="utf-8")


def _with_policy(spec: ClusterSpec, policy: str) -> ClusterSpec:
    """Raises ConfigError for a policy that there is not."""
    return replace(spec, gateway=replace(spec.gateway, policy=policy)).validate()


def _row(of: SimReport) -> list[str]:
    busy = ", ".join(f"{pool} {share:.0%}" for pool, share in of.utilization.items())
    times = (of.ttft_p50, of.ttft_p90, of.ttft_p99)
    return [
        of.policy,
        f"{of.rate:.2f}",
        f"{of.slo_attainment:.1%}",
        f"{of.goodput:.2f}",
        *(f"{seconds:.3f} s" for seconds in times),
        *(f"{1000 * seconds:.1f} ms" for seconds in (of.tpot_mean, of.tpot_p99)),
        f"{of.hit_tokens / of.prompt_tokens:.1%}",
        str(of.failed),
        busy,
    ]
