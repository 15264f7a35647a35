"""Simulations as one self-contained HTML page: what each run was like, over virtual time.

page.html beside this file has the styles and draws; it is given one JSON document, and nothing is
loaded from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from crossdock.bench.metrics import percentile
from crossdock.deploy.autoscaling.autoscale import PoolDecision
from crossdock.sim.cluster import WARM_UP_S, Served, SimCluster
from crossdock.sim.report import SimReport, meets
from crossdock.sim.samples import PoolSample, Sample, Samples

DATA = "@DATA@"
MOST_WINDOWS = 60
WINDOW_REQUESTS = 20  # of a window, on the average, at least
PERCENTILES = [percent / 2 for percent in range(201)]


def page(title: str, columns: Sequence[str], runs: Sequence[dict[str, Any]]) -> str:
    """The page of what `run_of` made of each run."""
    data = {"title": title, "columns": columns, "percentiles": PERCENTILES, "runs": runs}
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = template.partition(DATA)
    return before + _inside_script(data) + after


def run_of(
    scale: float, told: SimReport, cells: Sequence[str], cluster: SimCluster, samples: Samples
) -> dict[str, Any]:
    """What the page shows of one run, as JSON. Times in seconds since the first request.
    `scale` is the rate's, `cells` the row of the table."""
    slo, served = cluster.spec.slo, [each for each in cluster.served if not each.error]
    return {
        "policy": told.policy,
        "scale": scale,
        "rate": told.rate,
        "attainment": told.slo_attainment,
        "cells": cells,
        "slo": {"ttft": slo.ttft_ms / 1000, "tpot": slo.tpot_ms / 1000},
        "samples": _samples(samples.taken),
        "autoscaled": [name for name, pool in cluster.spec.pools.items() if pool.autoscale],
        "decisions": [_decision(at, each) for at, each in cluster.control.changes],
        "windows": _windows(cluster.served, lambda each: meets(each, slo)),
        "ttft": _distribution(each.ttft_s for each in served),
        "tpot": _distribution(each.tpot_s for each in served),
    }


def _samples(taken: Sequence[Sample]) -> dict[str, Any]:
    pools = taken[0].pools if taken else {}
    return {
        "at": [round(each.at_s, 3) for each in taken],
        "queued": [each.queued for each in taken],
        "pools": {
            name: {
                field: [_short(getattr(each.pools[name], field)) for each in taken]
                for field in PoolSample._fields
            }
            for name in pools
        },
    }


def _decision(at: float, decided: PoolDecision) -> dict[str, Any]:
    return {
        "at": round(at - WARM_UP_S, 3),
        "pool": decided.pool,
        "before": decided.before,
        "target": decided.target,
        "reason": decided.reason,
    }


def _windows(served: Sequence[Served], good: Callable[[Served], bool]) -> dict[str, Any]:
    """Requests by arrival, in equal spans of time: of each its middle, how many came in it and the
    share that was `good`, null where none came."""
    count = min(MOST_WINDOWS, max(1, len(served) // WINDOW_REQUESTS))
    first = served[0].at_s
    width = (served[-1].at_s - first) / count
    came, met = [0] * count, [0] * count
    for each in served:
        window = min(count - 1, int((each.at_s - first) / width)) if width else 0
        came[window] += 1
        met[window] += good(each)
    return {
        "at": [round(first + (window + 0.5) * width, 3) for window in range(count)],
        "requests": came,
        "met": [_short(m / c) if c else None for m, c in zip(met, came, strict=True)],
    }


def _distribution(found: Iterable[float | None]) -> list[float]:
    """The values at PERCENTILES; none of none."""
    values = sorted(each for each in found if each is not None)
    return [_short(percentile(values, each)) for each in PERCENTILES] if values else []


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _inside_script(data: Any) -> str:
    """JSON that can stand in a script element: no name in it ends that, or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
