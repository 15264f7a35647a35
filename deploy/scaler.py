"""The controller's autoscaler: looks at gateways and workers, and has autoscale() decide.

    look at gateways' counts and workers' loads ─> autoscale() ─> sizes, kept in the store ─> turn

A gateway that does not answer puts a decision off: half of the traffic is no observation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from crossdock.deploy.autoscaling.autoscale import Decision, PoolDecision, State, autoscale
from crossdock.deploy.autoscaling.measured import pool_state
from crossdock.deploy.autoscaling.observation import Observation, PoolState
from crossdock.deploy.autoscaling.rules import config_of
from crossdock.deploy.members import Watched
from crossdock.deploy.reconcile import State as MemberState
from crossdock.deploy.runtime import ProcessGone, StartFailed
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import Unavailable
from crossdock.proto.v1 import admin_pb2
from crossdock.router.dispatch.traffic import Traffic

log = logging.getLogger(__name__)

LOOK_S = 5.0  # for a gateway to say what it counted
IDLE_S = 1.0  # between two looks at whether anything is autoscaled

Counts = Mapping[str, Traffic]  # by model


@dataclass(eq=False)
class Scaler:
    """Owns what the autoscaler remembers, and the sizes of autoscaled pools. `spec` and `members`
    are the controller's; `record` gets each change and its reason, `changed` is called after one
    that is to be carried out."""

    store: ClusterStore
    spec: Callable[[], ClusterSpec]
    members: Sequence[Watched]
    record: Callable[[str, str], None]
    changed: Callable[[], None]
    clock: Callable[[], float] = time.monotonic
    decision: Decision = field(default_factory=lambda: Decision(()))  # the newest
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by pool and cause
    _state: State = field(default_factory=State)
    _looked_at: float | None = None
    _before: dict[Watched, Counts] = field(default_factory=dict)
    _counted: set[Watched] = field(default_factory=set)  # whose starts are known
    _dry: dict[str, int] = field(default_factory=dict)  # what a dry run has said already

    def __post_init__(self) -> None:
        self._sizes = self.store.sizes()

    def sized(self, spec: ClusterSpec) -> ClusterSpec:
        """`spec` with autoscaled pools of the sizes that were decided."""
        return spec.sized(self._sizes)

    def status(self) -> list[admin_pb2.PoolScale]:
        """The newest decision, pool by pool; before the first, how large they are to be."""
        spec = self.spec()
        decided = {each.pool: each for each in self.decision.pools}
        found = []
        for name, pool in self.sized(spec).pools.items():
            if not pool.autoscale:
                continue
            bounds = pool.autoscale
            shown = admin_pb2.PoolScale(pool=name, least=bounds.min, most=bounds.max)
            shown.target, shown.dry_run = pool.replicas, spec.autoscale.dry_run
            if each := decided.get(name):
                shown.target, shown.floor, shown.keep = each.target, each.floor, each.keep
                shown.reason = each.reason
                shown.cause = each.cause if each.target != each.before else ""
            found.append(shown)
        return found

    async def run(self) -> None:
        """Decides once an interval, for as long as the controller runs."""
        while True:
            spec = self.spec()
            active = any(pool.autoscale for pool in spec.pools.values())
            await asyncio.sleep(spec.autoscale.interval_s if active else IDLE_S)
            if not active:
                self._looked_at, self.decision = None, Decision(())
                continue
            try:
                await self.decide()
            except Exception:  # the next interval is another
                log.exception("a decision of the autoscaler failed")

    async def decide(self) -> None:
        """One decision, unless something of it is not known."""
        now, spec = self.clock(), self.spec()
        counts = await self._look()
        if counts is None:
            return
        before, self._before = self._before, counts
        since, self._looked_at = self._looked_at, now
        if since is None or now <= since:
            return  # the first look: from here on is counted
        traffic = _between(before, counts)
        config = config_of(spec)
        models = {pool.model for pool in config.pools}
        seen = Observation(
            now - since,
            self._pools(spec),
            {model: traffic.get(model, Traffic()) for model in models},
        )
        self._state, self.decision = autoscale(config, self._state, seen, now)
        self._carry_out(spec)

    def _carry_out(self, spec: ClusterSpec) -> None:
        if spec.autoscale.dry_run:
            self._say_what_would_be()
            return
        changes = self.decision.changes
        if not changes:
            return
        sizes = self._sizes | self.decision.targets
        try:
            self.store.save_sizes(sizes)
        except Unavailable as error:  # a restarted controller goes on with those before
            log.warning("the pools' sizes were not kept: %s", error)
        self._sizes = sizes
        for change in changes:
            self.changes[change.pool, change.cause] += 1
            self.record(_action(change), change.reason)
        self.changed()

    def _say_what_would_be(self) -> None:
        """Once for each size that would be another."""
        for each in self.decision.pools:
            if each.target != each.before and self._dry.get(each.pool) != each.target:
                self.record(f"dry run: {_action(each)}", each.reason)
        self._dry = {each.pool: each.target for each in self.decision.changes}

    async def _look(self) -> dict[Watched, Counts] | None:
        """What each gateway has counted; None where one does not say."""
        gateways = [m for m in self.members if m.is_gateway and m.serves]
        answers = await asyncio.gather(*map(_counts_of, gateways))
        if any(answer is None for answer in answers):
            return None
        return {each: answer for each, answer in zip(gateways, answers) if answer is not None}

    def _pools(self, spec: ClusterSpec) -> dict[str, PoolState]:
        sizes, found = self.sized(spec), {}
        self._counted &= set(self.members)
        for name, pool in sizes.pools.items():
            there = [m for m in self.members if m.pool == name]
            ready = [m for m in there if m.state is MemberState.READY]
            new = [m for m in ready if m.start_s is not None and m not in self._counted]
            self._counted.update(new)
            found[name] = pool_state(
                target=pool.replicas,
                loads=[m.load for m in ready if m.load is not None],
                starting=sum(m.live for m in there) - len(ready),
                block_size=spec.kv.block_size,
                started_s=tuple(m.start_s for m in new if m.start_s is not None),
                serving=len(ready),
            )
        return found


async def _counts_of(gateway: Watched) -> Counts | None:
    with contextlib.suppress(TimeoutError, ProcessGone, StartFailed):
        async with asyncio.timeout(LOOK_S):
            return await gateway.process.traffic()
    return None


def _between(before: Mapping[Watched, Counts], now: Mapping[Watched, Counts]) -> Counts:
    """What all gateways counted since; one that ended takes with it what it counted last."""
    found: dict[str, Traffic] = {}
    for gateway, counts in now.items():
        known = before.get(gateway)
        if known is None and gateway.adopted:
            continue  # what it counted before this controller's time
        for model, traffic in counts.items():
            since = traffic.since((known or {}).get(model, Traffic()))
            found[model] = found.get(model, Traffic()) + since
    return found


def _action(change: PoolDecision) -> str:
    return f"autoscale {change.pool} {change.before} -> {change.target}"
