"""Views of a cluster whose workers report what a test says, and what is asked of it."""

from __future__ import annotations

from crossdock.proto.types import Role
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import LoadReport, WorkerFacts

BLOCK = 16


def make_view(**roles: Role) -> ClusterView:
    view = ClusterView()
    for name, role in roles.items():
        add(view, name, role)
    return view


def add(view: ClusterView, name: str, role: Role, **load: float) -> None:
    facts = WorkerFacts(name, role, f"{name}-incarnation", 1000, BLOCK, 1000)
    worker = view.connected(facts, 0.0)
    full = {"free_blocks": 1000, "total_blocks": 1000, "prefill_tokens_per_s": 1000.0} | load
    view.reported(worker, LoadReport(**full), 0.0)  # type: ignore[arg-type]


def connect(view: ClusterView, name: str, role: Role, **facts: int) -> None:
    """A worker that has reported nothing yet."""
    given = {"num_blocks": 1000, "block_size": BLOCK, "block_bytes": 1000} | facts
    view.connected(WorkerFacts(name, role, f"{name}-incarnation", **given), 0.0)


def report(view: ClusterView, name: str, now: float = 0.0, **load: float) -> None:
    full = {"free_blocks": 1000, "total_blocks": 1000, "prefill_tokens_per_s": 1000.0} | load
    view.reported(view.workers[name], LoadReport(**full), now)  # type: ignore[arg-type]


def cache(view: ClusterView, name: str, hashes: list[bytes]) -> None:
    for block_hash in hashes:
        view.index.add(view.workers[name].slot, block_hash)


def demand(tokens: int = 160, **changes: object) -> Demand:
    hashes = [i.to_bytes(16) for i in range(tokens // BLOCK)]
    return Demand(**({"num_tokens": tokens, "block_hashes": hashes, "block_size": BLOCK} | changes))  # type: ignore[arg-type]


def two_and_two() -> ClusterView:
    return make_view(p0=Role.PREFILL, p1=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE)
