"""Placement policies side by side on a simulated trace: the highest rate at which each answers
90 % of the requests within the SLO.

    python benchmarks/policies.py TRACE [--cluster FILE] [--limit N] [--policy NAME …] [--json FILE]
    python benchmarks/policies.py TRACE --rate-scale 4 5 6      # these rates alone, as a table
    python benchmarks/policies.py TRACE --ablation              # pools, or workers that do both

The rate is found by bisection over --rate-scale, which multiplies the trace's own; requests keep
their order, and a rate's answers depend on nothing but the seed. Beside it each policy's TTFT at
the rates that all of them were tried at. --ablation gives the same GPUs to workers that do both
phases, under our policy and in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from crossdock.bench.traces import TraceOptions, load_trace
from crossdock.deploy.spec import ClusterSpec
from crossdock.router.placement.policy import POLICIES
from crossdock.sim.cluster import SimCluster
from crossdock.sim.report import SimReport, report
from crossdock.tables import console_of, table

CLUSTER = Path(__file__).parent.parent / "deploy/manifests/sim-8p8d.yaml"
OURS = "predicted_latency"
ATTAINED = 0.9
PRECISION = 0.02  # of a rate scale, relative


@dataclass(frozen=True)
class Trial:
    """One policy on one trace, at any rate."""

    trace: Path
    spec_yaml: str  # specs cannot be sent to another process
    limit: int
    jitter_s: float
    seed: int
    label: str

    def at(self, scale: float) -> SimReport:
        """The trace's rate times `scale`."""
        options = TraceOptions(self.limit, 1 / scale, self.jitter_s, seed=self.seed)
        spec = ClusterSpec.parse(self.spec_yaml)
        cluster = SimCluster(spec, seed=self.seed)
        cluster.run(load_trace(self.trace, options))
        return report(self.label, cluster, spec.slo)

    def highest(self, start: float) -> tuple[float, list[SimReport]]:
        """The highest scale that attains the aim, and what was tried on the way to it."""
        tried: list[SimReport] = []

        def attains(scale: float) -> bool:
            tried.append(self.at(scale))
            return tried[-1].slo_attainment >= ATTAINED

        low, high = 0.0, start
        while attains(high):
            low, high = high, 1.5 * high
        while high - low > PRECISION * high:
            middle = (low + high) / 2 if low else high / 1.5
            low, high = (middle, high) if attains(middle) else (low, middle)
            if high < PRECISION:
                break
        return low, tried


def colocated(spec: ClusterSpec) -> ClusterSpec:
    """The same workers, each of which does both phases."""
    replicas = sum(pool.replicas for pool in spec.pools.values())
    pool = replace(spec.pools["decode"], role="colocated", replicas=replicas)
    return replace(spec, pools=MappingProxyType({"both": pool})).validate()


def with_policy(spec: ClusterSpec, policy: str) -> ClusterSpec:
    return replace(spec, gateway=replace(spec.gateway, policy=policy))


def trials(args: argparse.Namespace) -> list[Trial]:
    spec = ClusterSpec.load(args.cluster)
    specs = {name: with_policy(spec, name) for name in args.policy or POLICIES}
    if args.ablation:
        specs = {
            "pools, ours": with_policy(spec, OURS),
            "pools, in turn": with_policy(spec, "round_robin"),
            "both phases, ours": with_policy(colocated(spec), OURS),
            "both phases, in turn": with_policy(colocated(spec), "round_robin"),
        }
    about = args.limit, args.jitter, args.seed
    return [Trial(args.trace, each.to_yaml(), *about, label) for label, each in specs.items()]


def highest_of(job: tuple[Trial, float]) -> tuple[float, list[SimReport]]:
    trial, start = job
    return trial.highest(start)


def at(job: tuple[Trial, float]) -> SimReport:
    trial, scale = job
    return trial.at(scale)


def find(args: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, object]:
    made = trials(args)
    found = list(pool.map(highest_of, [(trial, args.start) for trial in made]))
    own = found[0][1][0].rate / args.start
    rates = {trial.label: scale * own for trial, (scale, _) in zip(made, found)}
    rows = [[label, f"{rate:.2f}"] for label, rate in rates.items()]
    title = f"requests a second with {ATTAINED:.0%} within the SLO; the trace has {own:.2f}"
    console_of().print(table(title, ["", "rate"], rows, figures=["rate"]))
    result: dict[str, object] = {"rates": rates}
    others = {label: rate for label, rate in rates.items() if label != OURS}
    if OURS in rates and others:
        best = max(others, key=lambda label: others[label])
        result["ratio"] = rates[OURS] / others[best] if others[best] else float("inf")
        print(f"ours over {best}, the best of the others: {result['ratio']:.3f}")
    result["reports"] = [each.to_json() for _, tried in found for each in tried]
    return result


def compare(args: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, object]:
    jobs = [(trial, scale) for scale in args.rate_scale for trial in trials(args)]
    reports = list(pool.map(at, jobs))
    columns = ["", "rate", "SLO met", "goodput", "TTFT p50", "p90", "TPOT mean", "hits"]
    rows = [
        [
            each.policy,
            f"{each.rate:.2f}",
            f"{each.slo_attainment:.1%}",
            f"{each.goodput:.2f}",
            f"{each.ttft_p50:.3f}",
            f"{each.ttft_p90:.3f}",
            f"{1000 * each.tpot_mean:.1f} ms",
            f"{each.hit_tokens / each.prompt_tokens:.1%}",
        ]
        for each in reports
    ]
    console_of().print(table(args.trace.name, columns, rows, figures=columns[1:]))
    return {"reports": [each.to_json() for each in reports]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    parser.add_argument("--policy", nargs="+", choices=POLICIES)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=float, default=4.0, help="the first scale tried")
    parser.add_argument("--rate-scale", type=float, nargs="+")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.trace.is_file():
        sys.exit(f"skipped: {args.trace} is not there")
    with ProcessPoolExecutor(args.jobs) as pool:
        result = compare(args, pool) if args.rate_scale else find(args, pool)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
