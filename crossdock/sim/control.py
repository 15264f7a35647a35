"""The control plane on the virtual clock: the controller's autoscale() and reconcile() decide, and
workers start, drain and go as they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from crossdock.deploy.autoscaling.autoscale import PoolDecision, State, autoscale
from crossdock.deploy.autoscaling.measured import pool_state
from crossdock.deploy.autoscaling.observation import Observation, PoolState
from crossdock.deploy.autoscaling.rules import config_of
from crossdock.deploy.reconcile import Action, Do, Member, Target, reconcile
from crossdock.deploy.reconcile import State as MemberState
from crossdock.deploy.runtime import targets
from crossdock.deploy.spec import GATEWAY_POOL, ClusterSpec
from crossdock.router.dispatch.traffic import Traffic
from crossdock.sim.clock import VirtualClock
from crossdock.sim.worker import SimWorker

DRAIN_LOOK_S = 0.1  # between two looks at whether a worker has drained

Decide = Callable[[Observation, float], dict[str, int]]  # sizes of autoscaled pools


@dataclass(eq=False)
class SimMember(Member):
    """A worker, from the decision to start it until it has gone."""

    worker: SimWorker | None = None  # once it serves
    launched_at: float = 0.0
    gone_at: float | None = None
    start_s: float | None = None  # that it took; None: it was there from the beginning, or starts
    counted: bool = False  # its start was told

    def seconds(self, until: float) -> float:
        """For which it was there, from its launch on."""
        return (until if self.gone_at is None else self.gone_at) - self.launched_at


@dataclass(eq=False)
class SimControl:
    """Owns the members. `add` makes a worker of a pool, `tell` says who serves, `counts` is what
    gateways have counted. `decide` takes the place of autoscale(), for comparisons."""

    spec: ClusterSpec
    clock: VirtualClock
    add: Callable[[str, str], SimWorker]
    tell: Callable[[], None]
    counts: Callable[[], Traffic]
    decide: Decide | None = None
    members: list[SimMember] = field(default_factory=list)
    changes: list[tuple[float, PoolDecision]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # of autoscaled pools, as decided
    _state: State = field(default_factory=State)
    _seen: Traffic = field(default_factory=Traffic)

    def start(self) -> None:
        """The workers of the spec are there; from now on it is looked after them."""
        for target in self._targets():
            for index in range(target.replicas):
                self._launch(f"{target.pool}-{index}", target, there=True)
        if any(pool.autoscale for pool in self.spec.pools.values()):
            self.clock.call_later(self.spec.autoscale.interval_s, self._decide)
        self.tell()

    @property
    def workers(self) -> list[SimWorker]:
        """Those that serve, draining ones among them."""
        return [m.worker for m in self.members if m.worker is not None and m.gone_at is None]

    @property
    def all_workers(self) -> list[SimWorker]:
        """Those that have gone as well."""
        return [m.worker for m in self.members if m.worker is not None]

    def worker_seconds(self, until: float, pool: str = "") -> float:
        """Of all members until then, starting and draining ones too; of one pool, or of all."""
        return sum(m.seconds(until) for m in self.members if pool in ("", m.pool))

    # -- decisions -----------------------------------------------------------------------------

    def _decide(self) -> None:
        spec, now = self.spec, self.clock.now
        self.clock.call_later(spec.autoscale.interval_s, self._decide)
        counts = self.counts()
        traffic, self._seen = counts.since(self._seen), counts
        pools = {target.pool: self._pool_state(target) for target in self._targets()}
        seen = Observation(spec.autoscale.interval_s, pools, {"": traffic})
        if self.decide is not None:
            self.sizes = self.decide(seen, now)
        else:
            self._state, decision = autoscale(config_of(spec), self._state, seen, now)
            self.changes += [(now, change) for change in decision.changes]
            self.sizes = decision.targets
        self._reconcile()

    def _pool_state(self, target: Target) -> PoolState:
        there = [m for m in self._present if m.pool == target.pool]
        ready = [m for m in there if m.state is MemberState.READY]
        started = [m for m in ready if m.start_s is not None and not m.counted]
        for member in started:
            member.counted = True
        return pool_state(
            target=target.replicas,
            loads=[m.worker.role.load() for m in ready if m.worker is not None],
            starting=sum(m.live for m in there) - len(ready),
            block_size=self.spec.kv.block_size,
            started_s=tuple(m.start_s for m in started if m.start_s is not None),
        )

    # -- members -------------------------------------------------------------------------------

    @property
    def _present(self) -> list[SimMember]:
        return [m for m in self.members if m.gone_at is None]

    def _targets(self) -> list[Target]:
        return [t for t in targets(self.spec.sized(self.sizes)) if t.pool != GATEWAY_POOL]

    def _reconcile(self) -> None:
        wanted = self._targets()
        by_pool = {target.pool: target for target in wanted}
        for action in reconcile(wanted, self._present, {}, self.clock.now):
            if action.do is Do.START:
                self._launch(action.name, by_pool[action.pool])
            else:
                self._take_away(action)

    def _launch(self, name: str, target: Target, there: bool = False) -> None:
        state, now = MemberState.STARTING, self.clock.now
        member = SimMember(name, target.pool, target.role, target.revision, state, launched_at=now)
        self.members.append(member)
        worker = self.add(target.pool, name)
        if there:
            worker.serve()
            member.state, member.worker = MemberState.READY, worker
        else:
            self.clock.call_later(worker.profile.start_s, self._ready, member, worker)

    def _ready(self, member: SimMember, worker: SimWorker) -> None:
        if member.gone_at is not None:
            return
        worker.serve()
        member.state, member.worker = MemberState.READY, worker
        member.start_s = self.clock.now - member.launched_at
        self.tell()
        self._reconcile()

    def _take_away(self, action: Action) -> None:
        member = next(m for m in self._present if m.name == action.name)
        if action.do is Do.DRAIN and member.worker is not None:
            member.state = MemberState.DRAINING
            pool = self.spec.pools[member.pool]
            member.drain_deadline = self.clock.now + pool.drain_s
            member.worker.drain()
            self.clock.call_later(DRAIN_LOOK_S, self._drained, member)
            return
        member.gone_at = self.clock.now
        if member.worker is not None:
            member.worker.stop()
            self.tell()

    def _drained(self, member: SimMember) -> None:
        assert member.worker is not None
        role, late = member.worker.role, self.clock.now >= member.drain_deadline
        member.drained = role.idle
        if late and not member.drained:
            member.worker.eject()
        if late or member.drained:
            self._reconcile()
        else:
            self.clock.call_later(DRAIN_LOOK_S, self._drained, member)
