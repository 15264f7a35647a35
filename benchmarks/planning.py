"""Whether `crossdock plan` finds the cheapest static cluster: all smaller ones are simulated too.

    python benchmarks/planning.py TRACE … [--rate-scale S …] [--limit N] [--json FILE]

For each trace and rate, the plan; then all splits of fewer workers and all fewer co-located ones,
the smallest first, until one meets the aim; then what was planned again with another seed.
The ratio is the plan's replica-seconds over those of the best: all run as long as the trace.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crossdock.bench.traces import TraceOptions, load_trace
from crossdock.deploy.spec import ClusterSpec
from crossdock.planning.plan import Planner, pools_of, profile_of
from crossdock.planning.search import Size
from crossdock.tables import console_of, table

CLUSTER = Path(__file__).parent.parent / "deploy/manifests/sim-8p8d.yaml"
COLUMNS = (
    "trace", "rate", "plan", "attained", "other seed", "best of all", "ratio", "tried", "plan s",
)  # fmt: skip


def smaller(than: int) -> list[Size]:
    """Every cluster of fewer workers, the smallest first."""
    found = []
    for workers in range(1, than):
        found.append(Size(colocated=workers))
        found += [Size(prefill, workers - prefill) for prefill in range(1, workers)]
    return found


def measure(path: Path, scale: float, options: argparse.Namespace) -> dict[str, Any]:
    base = ClusterSpec.load(options.cluster)
    profile = profile_of(base)
    pools = pools_of(base, profile)
    trace = load_trace(path, TraceOptions(options.limit, 1 / scale))
    planner = Planner(base, profile, trace, pools, options.aim, options.most)
    planner.progress = lambda line: print(f"  {line}", file=sys.stderr, flush=True)
    started = time.process_time()
    plan = planner.plan()
    plan_s = time.process_time() - started
    found = plan.best
    if found is None:
        raise SystemExit(f"{path.name}: {options.most} workers do not meet the aim")
    best = next(
        (size for size in smaller(found.size.workers) if planner.attempt(size).meets(options.aim)),
        found.size,
    )
    again = replace(planner, seed=planner.seed + 1, _tried={})
    return {
        "trace": path.name,
        "rate": found.report.rate,
        "plan": asdict(found.size),
        "guess": asdict(plan.guess),
        "attained": found.outcome.attained,
        "attained_other_seed": again.attempt(found.size).attained,
        "best": asdict(best),
        "ratio": found.size.workers / best.workers,
        "simulations": plan.tried,
        "plan_s": plan_s,
        "verdict": plan.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, nargs="+")
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    parser.add_argument("--rate-scale", type=float, nargs="+", default=[1.0])
    parser.add_argument("--limit", type=int, default=0, help="rows of each trace; 0: all")
    parser.add_argument("--aim", type=float, default=0.99)
    parser.add_argument("--most", type=int, default=64, help="workers of a plan")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for path in options.trace:
        for scale in options.rate_scale:
            found.append(measure(path, scale, options))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    rows = [
        [
            of["trace"],
            f"{of['rate']:.2f}",
            Size(**of["plan"]),
            f"{of['attained']:.2%}",
            f"{of['attained_other_seed']:.2%}",
            Size(**of["best"]),
            f"{of['ratio']:.2f}",
            of["simulations"],
            f"{of['plan_s']:.0f}",
        ]
        for of in found
    ]
    console_of().print(table("plans against every smaller cluster", COLUMNS, rows, COLUMNS[6:]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
