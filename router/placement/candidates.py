"""The few workers among which a decision is made, of however many there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from crossdock.proto.types import Role
from crossdock.router.placement.demand import Demand, NoWorker
from crossdock.router.placement.prefix_index import Level
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.weighed import Computes
from crossdock.router.placement.workers import WorkerView

# How many of each side are weighed as pairs, since each pair has a link of its own.
PREFILL_CANDIDATES = 8
DECODE_CANDIDATES = 8


# One that may go on from token 0: seconds of the stream, more than on the best of them; bytes to
# pull; and which it is.
Decodes = tuple[float, float, WorkerView]


class Candidates(Protocol):
    """For one demand at one time. Of equal workers any are taken where there are too many."""

    levels: list[Level]  # of the prompt's blocks, as the index had them

    def depth(self, worker: WorkerView) -> int:
        """Leading blocks of the prompt that it holds."""

    def any_of(self, role: Role) -> bool:
        """Whether a worker of the role may get the sequence. What follows is asked only then."""

    def prefills(self) -> list[Computes]:
        """Those with room that have token 0 first, at most PREFILL_CANDIDATES."""

    def decodes(self, cut_off: Collection[str]) -> list[Decodes]:
        """Those with room where the stream, and a pull from nobody in particular, cost the least,
        at most DECODE_CANDIDATES; without those of the names `cut_off`, where there are others."""

    def colocated(self) -> list[Computes]:
        """Those with room that do both phases at the least cost, at most PREFILL_CANDIDATES; and
        the one of them that answered the turn before, whatever it costs."""

    def local(self) -> list[Computes]:
        """Decode workers that have more of the prompt than any prefill worker, or answered the turn
        before it and have as many blocks, and may compute the rest: a few tokens, those that wait
        there already included, so that no stream waits for long. That is presumed to take as long
        as on the fastest prefill worker. At most DECODE_CANDIDATES."""


def nobody(
    view: ClusterView,
    demand: Demand,
    among: Candidates,
    needed: Sequence[Role] = (Role.PREFILL, Role.DECODE),
) -> NoWorker:
    """Names the roles that nobody fills, or nobody who can hold the sequence."""
    missed = [role for role in needed if not among.any_of(role)]
    small = any(view.count(role) for role in missed)
    held = f" that holds {demand.held[missed[-1]]} tokens" if small else ""
    return NoWorker(f"no {' and no '.join(missed)} worker{held} is ready")
