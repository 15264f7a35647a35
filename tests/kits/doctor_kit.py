"""Sound findings of a doctor, to be changed by its tests."""

from __future__ import annotations

from typing import Any

from crossdock.findings import PairFacts, WorkerFacts, judge
from crossdock.proto.types import Role

VERSIONS = {"crossdock": "0.1.0", "torch": "2.13.0"}
LAYOUT = {"model_id": "m", "dtype": "float32", "block_size": 16}


def facts(name: str, role: Role, **changes: Any) -> WorkerFacts:
    sound: dict[str, Any] = {
        "address": f"{name}:1",
        "node": f"node-of-{name}",
        "transport": "nixl",
        "layout_hash": "aa",
        "layout": LAYOUT,
        "skew_s": 0.0004,
        "skew_error_s": 0.0005,
        "versions": VERSIONS,
        "host": "one",
        "memory_type": "DRAM",
    }
    return WorkerFacts(name=name, role=str(role), **(sound | changes))


P = facts("p", Role.PREFILL)
D = facts("d", Role.DECODE)
OK = PairFacts("d", "p", "ok", "", 0.01, 0.0002, 2e9, 64, 1_000, 0, None, "shared memory")


def lines(workers: list[WorkerFacts], *pairs: PairFacts) -> list[str]:
    return [str(finding) for finding in judge(workers, pairs) if finding.problem]


def warnings(workers: list[WorkerFacts], *pairs: PairFacts) -> list[str]:
    return [str(finding) for finding in judge(workers, pairs) if not finding.problem]
