"""How a simulated cluster stands, looked at again and again on its clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from crossdock.bench.traces import Trace
from crossdock.deploy.reconcile import State
from crossdock.sim.cluster import WARM_UP_S, SimCluster

ENOUGH = 300  # samples of a run
MOST = 2 * ENOUGH + 1  # then every other is dropped, and as few are taken from then on
SHORTEST_S = 0.02  # between two


class PoolSample(NamedTuple):
    """A pool's workers together. Sequences, shares of their KV blocks, workers."""

    waiting: int
    running: int
    used: float  # blocks that sequences hold
    cached: float  # that none holds and whose KV is kept
    ready: int
    starting: int
    draining: int


class Sample(NamedTuple):
    """The cluster at one moment."""

    at_s: float  # since the first request of the trace
    queued: int  # sequences that wait at gateways
    pools: dict[str, PoolSample]


@dataclass(eq=False)
class Samples:
    """Takes ENOUGH samples of a cluster's run, or up to twice as many, however long it is: it
    begins with the interval that suits the trace, and doubles it where the run takes longer."""

    cluster: SimCluster
    trace: Trace
    taken: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = self.trace.requests
        self._interval_s = max(SHORTEST_S, (rows[-1].at_s - rows[0].at_s) / ENOUGH)
        self.cluster.clock.call_at(WARM_UP_S, self._take)

    def _take(self) -> None:
        cluster, taken = self.cluster, self.taken
        queued = sum(
            each.dispatcher.queued_sequences + each.dispatcher.waiting_sequences
            for each in cluster.gateways
        )
        pools = {name: self._pool(name) for name in cluster.spec.pools}
        taken.append(Sample(cluster.clock.now - WARM_UP_S, queued, pools))
        if len(taken) == MOST:
            del taken[1::2]
            self._interval_s *= 2
        cluster.clock.call_later(self._interval_s, self._take)

    def _pool(self, name: str) -> PoolSample:
        members = [m for m in self.cluster.control.members if m.pool == name and m.gone_at is None]
        waiting = running = free = kept = blocks = 0
        for member in members:
            if member.worker is None:
                continue
            role = member.worker.role
            pool = role.state.pool
            waiting += role.waiting
            running += role.running
            free += pool.num_free
            kept += pool.num_evictable
            blocks += pool.num_blocks
        states = [member.state for member in members]
        return PoolSample(
            waiting,
            running,
            (blocks - free - kept) / blocks if blocks else 0.0,
            kept / blocks if blocks else 0.0,
            *(states.count(each) for each in (State.READY, State.STARTING, State.DRAINING)),
        )
