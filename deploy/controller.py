"""Watches the cluster, decides with reconcile(), and makes it what the spec says.

One loop: observe -> reconcile -> act -> tell everyone who is there. It turns whenever something
changed, and once a second for what time alone changes (deadlines, pauses of a crash loop).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace

from crossdock.deploy.applied import AppliedSpec, Change
from crossdock.deploy.authority import Authority, gateways_key, workers_key
from crossdock.deploy.members import Watched, WatchSettings
from crossdock.deploy.reconcile import (
    MAX_BACKOFF_S,
    Action,
    Do,
    Losses,
    State,
    Target,
    converged,
    reconcile,
)
from crossdock.deploy.runtime import (
    TRIAL,
    CannotStart,
    Launch,
    Membership,
    Process,
    ProcessGone,
    Runtime,
    StartFailed,
    gateway_launch,
    targets,
    trial_launch,
    worker_launch,
)
from crossdock.deploy.scaler import Scaler
from crossdock.deploy.spec import GATEWAY_POOL, ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.deploy.trial import try_gateway
from crossdock.deploy.waiting import waiting_for
from crossdock.proto.errors import ConfigError, Overtaken, Unavailable
from crossdock.proto.v1 import admin_pb2
from crossdock.router.serving import Serving

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerSettings:
    """Times in seconds."""

    turn_s: float = 1.0
    trial_s: float = 60.0  # for a gateway with new settings to start
    adopt_s: float = 5.0  # for processes that run already to say so
    update_timeout_s: float = 10.0
    loss_memory_s: float = 60.0  # losses further apart than this are no crash loop
    decisions_kept: int = 200
    watch: WatchSettings = field(default_factory=WatchSettings)


class Controller:
    """Owns the applied spec and every process of the cluster from `run` to `down`."""

    def __init__(
        self, runtime: Runtime, store: ClusterStore, settings: ControllerSettings | None = None
    ) -> None:
        self.runtime = runtime
        self._store = store
        self._settings = settings or ControllerSettings()
        self.applied = AppliedSpec(store)
        self.authority = Authority(store.key(), self.spec.metadata.name)
        self._key, self._gateways_key = workers_key(store.key()), gateways_key(store.key())
        self.members: list[Watched] = []
        self.decisions: deque[admin_pb2.Decision] = deque(maxlen=self._settings.decisions_kept)
        self.failure = ""  # of the last turn
        self.metrics_address = ""  # host:port, where they are served
        self._adopted = False
        self.errors: dict[str, str] = {}  # by name, until one by that name is ready again
        self.restarts: defaultdict[str, int] = defaultdict(int)
        self.losses: dict[str, Losses] = {}
        self._wake = asyncio.Event()
        self._turned = asyncio.Condition()
        self._ending: asyncio.Task[None] | None = None  # once it goes down
        self._looping = asyncio.Lock()  # held while the loop may start processes
        self._drain_until = float("inf")
        self._background: set[asyncio.Task[None]] = set()
        told = (self._record, self._wake.set)
        self.scaler = Scaler(store, lambda: self.spec, self.members, *told)

    @property
    def spec(self) -> ClusterSpec:
        """The one that is followed."""
        return self.applied.spec

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Adopts what runs already, then keeps the cluster as specified until `down` has ended."""
        scaling = asyncio.create_task(self.scaler.run())
        try:
            async with self._looping:
                await self._turn_until_ending()
        finally:
            scaling.cancel()
        assert self._ending is not None
        await asyncio.shield(self._ending)

    async def _turn_until_ending(self) -> None:
        pause_s = self._settings.turn_s
        while self._ending is None:
            try:
                if not self._adopted:
                    await self._adopt()
                await self.turn()
                self.failure, pause_s = "", self._settings.turn_s
            except Exception as error:  # shown by the status, and tried again
                log.exception("a turn failed")
                self.failure = f"{type(error).__name__}: {error}"
                pause_s = min(MAX_BACKOFF_S, 2 * pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def _adopt(self) -> None:
        """Takes over what runs. Who serves is known before anyone is told a membership: one that
        lacks a worker would break what that worker has under way."""
        for launch, process in await self.runtime.adopt():
            self._watch(launch, process, adopted=True)
            self._record(f"adopt {launch.name}", "was running when the controller started")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.adopt_s):
                while any(m.state is State.STARTING for m in self.members):
                    self._wake.clear()
                    await self._wake.wait()
        best_last = sorted(self.members, key=lambda m: (m.state is State.READY, m.live))
        keep = {m.name: m for m in best_last if m.name != TRIAL}
        for watched in [m for m in self.members if m is not keep.get(m.name)]:
            self._record(f"stop {watched.name}", "was a trial, or another took its place")
            await self._end(watched)
        self._adopted = True

    async def turn(self) -> None:
        """One round: decides, acts, and tells everybody of the members."""
        self._wake.clear()
        self._count_losses()
        leaving = [await self._act(action) for action in self._decide(self.spec)]
        told = self._push_membership()
        if self.converged:
            self.applied.carried_out()
            self.errors.clear()
            for pool, losses in self.losses.items():
                self.losses[pool] = replace(losses, places=(), hopeless="")
        for watched in filter(None, leaving):
            self._spawn(self._empty(watched, told))
        await self._notify()

    async def _notify(self) -> None:
        async with self._turned:
            self._turned.notify_all()

    def _decide(self, spec: ClusterSpec) -> list[Action]:
        members = [member for member in self.members if member.name != TRIAL]
        return reconcile(self._targets(spec), members, self.losses, time.monotonic())

    def _targets(self, spec: ClusterSpec) -> list[Target]:
        """The pools of `spec`, autoscaled ones as large as was decided."""
        return targets(self.scaler.sized(spec))

    @property
    def converged(self) -> bool:
        """Everything runs as specified, and everyone knows of everyone."""
        as_specified = converged(self._targets(self.spec), self.members)
        told = all(map(self.is_told, self.members))
        return as_specified and told and not (self._ending or self.failure)

    async def _act(self, action: Action) -> Watched | None:
        """Starts or stops; what is to be drained, to leave or to flip, is returned, marked so."""
        self._record(*str(action).split(": ", 1))
        if action.do is Do.START:
            self._place_taken(action.name, action.pool)
            try:
                launch = self._launch(action)
                self._watch(launch, await self.runtime.launch(launch))
            except Exception as error:  # this member's failure, not the turn's
                log.exception("launching %s", action.name)
                hopeless = isinstance(error, (CannotStart, ConfigError))
                self._count_loss(action.name, action.pool, str(error), True, hopeless)
            return None
        watched = next(m for m in self.members if m.name == action.name)
        if action.do is Do.DRAIN:
            watched.leave(self._drain_s(watched))
            return watched
        if action.do is Do.FLIP:
            launch = worker_launch(self.spec, action.pool, action.becomes, self._key)
            watched.turn_into(launch, self._drain_s(watched))
            self._place_taken(action.becomes, action.pool)
            return watched
        await self._end(watched)
        return None

    async def _end(self, watched: Watched) -> None:
        self.members.remove(watched)
        if watched.is_gateway:
            await watched.stop()  # its ports must be free before another takes them
        else:
            self._spawn(watched.stop())

    def _place_taken(self, taken: str, pool: str) -> None:
        losses = self.losses.get(pool, Losses())
        places = tuple(name for name in losses.places if name != taken)
        self.losses[pool] = replace(losses, places=places)

    async def _empty(self, watched: Watched, told: Sequence[asyncio.Task[None]]) -> None:
        """First the gateways hear that it goes, then it refuses new work."""
        if told:
            await asyncio.wait(told, timeout=1.0)
        await (watched.flip() if watched.state is State.FLIPPING else watched.drain())

    def _launch(self, action: Action) -> Launch:
        if action.pool == GATEWAY_POOL:
            keys = self._key, self._gateways_key
            return gateway_launch(self.spec, action.name, action.slot, *keys)
        return worker_launch(self.spec, action.pool, action.name, self._key)

    def _drain_s(self, watched: Watched) -> float:
        if watched.is_gateway:
            return self.spec.gateway.drain_s
        pool = self.spec.pools.get(watched.pool)
        return pool.drain_s if pool else 60.0

    def _watch(self, launch: Launch, process: Process, adopted: bool = False) -> None:
        changed, settings = self._wake.set, self._settings.watch
        watched = Watched(launch, process, changed, settings, self.authority, adopted)
        self.members.append(watched)

    def _count_losses(self) -> None:
        """A loss of a revision that is wanted no more says nothing about the next start."""
        revisions = {t.pool: t.revision for t in self._targets(self.spec) if t.replicas}
        failed = []
        for watched in self.members:
            name, pool = watched.name, watched.pool
            wanted = watched.revision == revisions.get(pool)
            if watched.state is State.READY:
                self.errors.pop(name, None)
            elif watched.state is State.LOST:
                again, hopeless = wanted and watched.barely_served, wanted and watched.hopeless
                self._count_loss(name, pool, watched.why, again, hopeless)
                if wanted and watched.is_gateway and watched.ready_at is None:
                    failed.append(f"{name} did not start: {watched.why}")
        for why in failed[:1]:
            self._roll_back(why)

    def _count_loss(self, name: str, pool: str, why: str, again: bool, hopeless: bool) -> None:
        now, before = time.monotonic(), self.losses.get(pool, Losses())
        again = again and now - before.last < self._settings.loss_memory_s
        count, reason = before.count + 1 if again else 1, f"{name}: {why}" if hopeless else ""
        self.losses[pool] = Losses(count, now, (*before.places, name), reason)
        self.errors[name] = why
        self.restarts[name] += 1

    # -- who is there --------------------------------------------------------------------------

    def _push_membership(self) -> list[asyncio.Task[None]]:
        """Tells everyone whose membership is another than it was told, one push at a time each:
        two under way could arrive in either order."""
        for watched in self.members:
            wanted = self._membership_for(watched)
            busy = watched.push is not None and not watched.push.done()
            if watched.serves and not busy and watched.told != wanted:
                watched.push = self._spawn(self._push(watched, wanted))
        return [m.push for m in self.members if m.push is not None and not m.push.done()]

    def _membership_for(self, watched: Watched) -> Membership:
        """Gateways send to ready workers; workers pull from those that finish their work too."""
        endpoints = [
            replace(member.started.endpoint, model=member.launch.model)
            for member in self.members
            if member.serves and (member.state is State.READY or not watched.is_gateway)
            if member.started and member.started.endpoint
        ]
        return Membership(endpoints, self.spec.serving if watched.is_gateway else None)

    async def _push(self, watched: Watched, members: Membership) -> None:
        try:
            async with asyncio.timeout(self._settings.update_timeout_s):
                await watched.process.update(members)
            watched.told = members
            await self._notify()
            self._wake.set()  # the membership may have changed meanwhile
        except (TimeoutError, ProcessGone, StartFailed) as error:
            log.warning("%s was not told the membership: %r", watched.name, error)

    # -- what is asked of it -------------------------------------------------------------------

    def plan(self, spec: ClusterSpec) -> list[str]:
        """What applying `spec` would do first. Raises ConfigError for what can't be changed."""
        self.applied.check_change(spec)
        return [str(action) for action in self._decide(spec)]

    async def change(self, to: Change, by: str, generation: int = 0) -> list[str]:
        """Applies what `to` makes of the spec, after trying its gateways. Returns `plan` of it.

        `by` says who asks. Raises Overtaken when the spec lacks the change and is not, or not any
        more, of `generation` (0: any); ConfigError when it can't be changed so; Unavailable once
        the cluster goes down.
        """
        self._check_open()
        spec = to(self.spec)
        self.applied.check_change(spec)
        if spec != self.spec:
            generation = generation or self.applied.generation
            self.applied.check_generation(generation)
            if _tells_gateways(spec) != _tells_gateways(self.spec):
                taken = frozenset[str]().union(*(m.holds for m in self.members))
                launch = trial_launch(spec, taken, self._key, self._gateways_key)
                await try_gateway(self.runtime, launch, self.authority, self._settings.trial_s)
                self._check_open()
                self.applied.check_generation(generation)
        return self.apply(spec, by)

    def _check_open(self) -> None:
        if self._ending:
            raise Unavailable("the cluster is going down")

    def apply(self, spec: ClusterSpec, by: str = "apply") -> list[str]:
        """Makes `spec` the one to follow, also after a restart. Returns `plan` of it.

        What failed under another revision is not held against the new one.
        """
        self.applied.check_change(spec)
        before = {target.pool: target.revision for target in self._targets(self.spec)}
        wanted = {each.pool: each.revision for each in self._targets(spec) if each.replicas}
        changed = spec != self.spec
        self.applied.follow(spec, by)
        self.losses = {
            pool: losses if wanted[pool] == before.get(pool) else Losses(places=losses.places)
            for pool, losses in self.losses.items()
            if pool in wanted
        }
        for name in {name for name in self.errors if name.rpartition("-")[0] not in wanted}:
            del self.errors[name]
        actions = self.plan(spec)
        if changed:  # who waits for a change asks for it again and again
            due = f"{len(actions)} actions due" if actions else "nothing to start or stop"
            self._record(by, due)
        self._wake.set()
        return actions

    def _roll_back(self, why: str) -> None:
        """The last good spec instead of one whose gateways don't start: they had to make room."""
        good, spec = self.applied.good, self.spec
        if good is not None and good.gateway_revision() != spec.gateway_revision():
            self.apply(good, f"going back, as {why}")

    async def wait_converged(self, timeout_s: float, to: Change = lambda spec: spec) -> bool:
        """Whether the cluster became as specified within `timeout_s`; at once where it can't.

        Raises Overtaken as soon as the spec has not what `to` made of it any more.
        """

        def overtaken() -> bool:
            return to(self.spec) != self.spec

        def settled() -> bool:
            return self.converged or bool(self._ending or self.hopeless) or overtaken()

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._turned:
                await self._turned.wait_for(settled)
        if overtaken():
            now = f"generation {self.applied.generation}, made by {self.applied.changed_by}"
            raise Overtaken(f"the change was overtaken by {now}")
        return self.converged

    @property
    def hopeless(self) -> list[str]:
        """Why pools can't have any member of their revision, until another is applied."""
        return [losses.hopeless for losses in self.losses.values() if losses.hopeless]

    def waiting_for(self) -> list[str]:
        """What keeps the cluster from being as specified, one line each."""
        return waiting_for(self)

    def is_told(self, watched: Watched) -> bool:
        """Whether it has taken the membership that is its newest."""
        return watched.told == self._membership_for(watched)

    async def down(self, drain_s: float) -> None:
        """Lets gateways finish for `drain_s`, ends every process, forgets the cluster.

        Called again, it waits no longer than the shorter of both.
        """
        self._drain_until = min(self._drain_until, time.monotonic() + drain_s)
        if self._ending is None:
            self._wake.set()
            self._record("down", f"asked to, draining for {drain_s:g} s")
            self._ending = asyncio.create_task(self._end_everything())
        await asyncio.shield(self._ending)  # it goes on where a caller is cancelled

    async def _end_everything(self) -> None:
        await self._looping.acquire()
        await self._drain_gateways()
        await asyncio.gather(*(m.stop() for m in self.members if m.is_gateway))
        await asyncio.gather(*(m.stop() for m in self.members if not m.is_gateway))
        self.members.clear()
        if self._background:
            await asyncio.wait(self._background, timeout=self._settings.update_timeout_s)
        self._store.end()

    async def _drain_gateways(self) -> None:
        serving = (State.READY, State.DRAINING)
        gateways = [m for m in self.members if m.is_gateway and m.state in serving]
        for watched in gateways:
            watched.leave(self._drain_until - time.monotonic())
        drains = {self._spawn(watched.drain()) for watched in gateways}
        while drains and time.monotonic() < self._drain_until:
            _, drains = await asyncio.wait(drains, timeout=0.1)
        for drain in drains:
            drain.cancel()

    def why_not_ready(self, watched: Watched) -> str:
        """Why it, or the last by its name, was lost, or can't be placed; empty if none is known."""
        why = watched.why or self.errors.get(watched.name, "")
        if not why and watched.state is State.STARTING:
            return self.runtime.why_waiting(watched.launch)
        return why

    def _record(self, action: str, reason: str) -> None:
        log.info("%s: %s", action, reason)
        decision = admin_pb2.Decision(unix_s=time.time(), action=action, reason=reason)
        self.decisions.append(decision)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _tells_gateways(spec: ClusterSpec) -> tuple[str, Serving]:
    """What a gateway is tried for before it is told, or replaced."""
    return spec.gateway_revision(), spec.serving
