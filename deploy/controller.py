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
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace

from crossdock.deploy.members import Watched, WatchSettings
from crossdock.deploy.reconcile import (
    GATEWAY_ROLE,
    Action,
    Do,
    Losses,
    Member,
    State,
    Target,
    converged,
    reconcile,
)
from crossdock.deploy.runtime import (
    Launch,
    Process,
    ProcessGone,
    Runtime,
    StartFailed,
    gateway_launch,
    worker_launch,
)
from crossdock.deploy.spec import GATEWAY_POOL, ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError
from crossdock.proto.types import WorkerEndpoint

log = logging.getLogger(__name__)

FIXED_FIELDS: tuple[tuple[str, Callable[[ClusterSpec], object]], ...] = (
    ("metadata.name", lambda spec: spec.metadata.name),
    ("model.id", lambda spec: spec.model.id),
    ("model.dtype", lambda spec: spec.model.dtype),
    ("kv.block_size", lambda spec: spec.kv.block_size),
    ("kv.transport", lambda spec: spec.kv.transport),
    ("controller.grpc", lambda spec: spec.controller.grpc),
    ("ray.address", lambda spec: spec.ray.address),
    ("ray.object_store_mb", lambda spec: spec.ray.object_store_mb),
)


@dataclass(frozen=True)
class ControllerSettings:
    """Times in seconds."""

    turn_s: float = 1.0
    adopt_s: float = 5.0  # for processes that run already to say so
    update_timeout_s: float = 10.0
    loss_memory_s: float = 60.0  # losses further apart than this are no crash loop
    decisions_kept: int = 200
    watch: WatchSettings = field(default_factory=WatchSettings)


@dataclass(frozen=True)
class DecisionRecord:
    unix_s: float
    action: str
    reason: str


class Controller:
    """Owns the applied spec and every process of the cluster from `run` to `down`."""

    def __init__(
        self,
        runtime: Runtime,
        store: ClusterStore,
        settings: ControllerSettings | None = None,
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._settings = settings or ControllerSettings()
        self.spec = ClusterSpec.parse(store.spec(), str(store.spec_path))
        self._key = store.key()
        self.members: list[Watched] = []
        self.decisions: deque[DecisionRecord] = deque(maxlen=self._settings.decisions_kept)
        self.errors: dict[str, str] = {}  # by name, until one by that name is ready again
        self.restarts: defaultdict[str, int] = defaultdict(int)
        self._losses: dict[str, Losses] = {}
        self._wake = asyncio.Event()
        self._turned = asyncio.Condition()
        self._closing = False
        self._looping = asyncio.Lock()  # held while the loop may start processes
        self._drain_until = float("inf")
        self.ended = asyncio.Event()  # after `down`
        self._background: set[asyncio.Task[None]] = set()

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Adopts what runs already, then keeps the cluster as specified until `down`."""
        async with self._looping:
            await self._adopt()
            while not self._closing:
                await self.turn()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.turn_s):
                        await self._wake.wait()

    async def _adopt(self) -> None:
        """Takes over what runs. Who serves is known before anyone is told a membership: one that
        lacks a worker would break what that worker has under way."""
        for launch, process in await self._runtime.adopt():
            self._watch(launch, process)
            self._record(f"adopt {launch.name}", "was running when the controller started")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.adopt_s):
                while any(m.state is State.STARTING for m in self.members):
                    self._wake.clear()
                    await self._wake.wait()

    async def turn(self) -> None:
        self._wake.clear()
        self._count_losses()
        leaving = [await self._act(action) for action in self._decide(self.spec)]
        told = self._push_membership()
        if self.converged:
            self.errors.clear()
            for pool, losses in self._losses.items():
                self._losses[pool] = replace(losses, places=())
        for watched in filter(None, leaving):
            self._spawn(self._drain(watched, told))
        await self._notify()

    async def _notify(self) -> None:
        async with self._turned:
            self._turned.notify_all()

    def _decide(self, spec: ClusterSpec) -> list[Action]:
        return reconcile(targets(spec), self.observed(), self._losses, time.monotonic())

    def observed(self) -> list[Member]:
        return [watched.seen() for watched in self.members]

    @property
    def converged(self) -> bool:
        """Everything runs as specified, and everyone knows of everyone."""
        as_specified = converged(targets(self.spec), self.observed())
        told = all(m.told == self._membership_for(m) for m in self.members)
        return as_specified and told and not self._closing

    async def _act(self, action: Action) -> Watched | None:
        """Starts or stops; what is to be drained is returned, marked as such."""
        self._record(f"{action.do} {action.name}", action.reason)
        if action.do is Do.START:
            launch = self._launch(action)
            self._watch(launch, await self._runtime.launch(launch))
            self._place_taken(action)
            return None
        watched = next(m for m in self.members if m.name == action.name)
        if action.do is Do.DRAIN:
            watched.leave(self._drain_s(watched))
            return watched
        self.members.remove(watched)
        if watched.is_gateway:
            await watched.stop()  # its ports must be free before another takes them
        else:
            self._spawn(watched.stop())
        return None

    def _place_taken(self, action: Action) -> None:
        losses = self._losses.get(action.pool, Losses())
        places = tuple(name for name in losses.places if name != action.name)
        self._losses[action.pool] = replace(losses, places=places)

    async def _drain(self, watched: Watched, told: Sequence[asyncio.Task[None]]) -> None:
        """First the gateways hear that it goes, then it refuses new work."""
        if told:
            await asyncio.wait(told, timeout=1.0)
        await watched.drain()

    def _launch(self, action: Action) -> Launch:
        if action.pool == GATEWAY_POOL:
            return gateway_launch(self.spec, action.name, self._free_gateway_index(), self._key)
        return worker_launch(self.spec, action.pool, action.name, self._key)

    def _free_gateway_index(self) -> int:
        """Which of the gateways' ports are free."""
        gateways = [m.launch.gateway for m in self.members if m.launch.gateway is not None]
        taken = {gateway["grpc"] for gateway in gateways}
        index = 0
        while (grpc := self.spec.gateway_addresses(index)[0]) in taken and not grpc.endswith(":0"):
            index += 1
        return index

    def _drain_s(self, watched: Watched) -> float:
        if watched.is_gateway:
            return self.spec.gateway.drain_s
        pool = self.spec.pools.get(watched.launch.pool)
        return pool.drain_s if pool else 60.0

    def _watch(self, launch: Launch, process: Process) -> None:
        self.members.append(Watched(launch, process, self._wake.set, self._settings.watch))

    def _count_losses(self) -> None:
        now = time.monotonic()
        for watched in self.members:
            if watched.state is State.READY:
                self.errors.pop(watched.name, None)
            if watched.state is not State.LOST:
                continue
            pool = watched.launch.pool
            before = self._losses.get(pool, Losses())
            again = watched.barely_served and now - before.last < self._settings.loss_memory_s
            places = (*before.places, watched.name)
            self._losses[pool] = Losses(before.count + 1 if again else 1, now, places)
            self.errors[watched.name] = watched.why
            self.restarts[watched.name] += 1

    # -- who is there --------------------------------------------------------------------------

    def _push_membership(self) -> list[asyncio.Task[None]]:
        """Tells everyone whose membership is another than it was told, one push at a time each:
        two under way could arrive in either order."""
        for watched in self.members:
            wanted = self._membership_for(watched)
            busy = watched.push is not None and not watched.push.done()
            serving = watched.state in (State.READY, State.DRAINING)
            if serving and not busy and watched.told != wanted:
                watched.push = self._spawn(self._push(watched, wanted))
        return [m.push for m in self.members if m.push is not None and not m.push.done()]

    def _membership_for(self, watched: Watched) -> list[WorkerEndpoint]:
        """Gateways send to ready workers; workers pull from draining ones too."""
        if watched.is_gateway:
            return self._endpoints(State.READY)
        return self._endpoints(State.READY, State.DRAINING)

    def _endpoints(self, *states: State) -> list[WorkerEndpoint]:
        return [
            m.started.endpoint
            for m in self.members
            if m.state in states and m.started is not None and m.started.endpoint is not None
        ]

    async def _push(self, watched: Watched, endpoints: Sequence[WorkerEndpoint]) -> None:
        try:
            async with asyncio.timeout(self._settings.update_timeout_s):
                await watched.process.update(endpoints)
            watched.told = endpoints
            await self._notify()
            self._wake.set()  # the membership may have changed meanwhile
        except (TimeoutError, ProcessGone, StartFailed) as error:
            log.warning("%s was not told the membership: %r", watched.name, error)

    # -- what is asked of it -------------------------------------------------------------------

    def plan(self, spec: ClusterSpec) -> list[str]:
        """What applying `spec` would do first. Raises ConfigError for what can't be changed."""
        self.check_change(spec)
        return [str(action) for action in self._decide(spec)]

    def apply(self, spec: ClusterSpec) -> list[str]:
        """Makes `spec` the one to follow, also after a restart. Returns `plan` of it."""
        actions = self.plan(spec)
        self._store.save_spec(spec.to_yaml())
        self.spec = spec
        self._record("apply", f"{len(actions)} actions due" if actions else "nothing to do")
        self._wake.set()
        return actions

    def check_change(self, spec: ClusterSpec) -> None:
        for path, read in FIXED_FIELDS:
            before, after = read(self.spec), read(spec)
            if before != after:
                message = f"cannot change from {before!r} to {after!r} while the cluster runs"
                raise ConfigError(path, f"{message}; use `crossdock down` and `up`")

    async def wait_converged(self, timeout_s: float) -> bool:
        """Whether the cluster became what the spec says within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._turned:
                await self._turned.wait_for(lambda: self.converged or self._closing)
        except TimeoutError:
            return False
        return self.converged

    async def down(self, drain_s: float) -> None:
        """Lets gateways finish for `drain_s`, ends every process, forgets the cluster.

        Called again, it waits no longer than the shorter of both.
        """
        self._drain_until = min(self._drain_until, time.monotonic() + drain_s)
        if not self._closing:
            self._closing = True
            self._wake.set()
            self._record("down", f"asked to, draining for {drain_s:g} s")
            await self._end_everything()
        await self.ended.wait()

    async def _end_everything(self) -> None:
        await self._looping.acquire()
        await self._drain_gateways()
        await asyncio.gather(*(m.stop() for m in self.members if m.is_gateway))
        await asyncio.gather(*(m.stop() for m in self.members if not m.is_gateway))
        self.members.clear()
        if self._background:
            await asyncio.wait(self._background, timeout=self._settings.update_timeout_s)
        self._store.end()
        self.ended.set()

    async def _drain_gateways(self) -> None:
        gateways = [m for m in self.members if m.is_gateway and m.state is State.READY]
        remaining = max(0.0, self._drain_until - time.monotonic())
        if not gateways or not remaining:
            return
        drains = asyncio.gather(*(self._drain_gateway(m, remaining) for m in gateways))
        while not drains.done() and time.monotonic() < self._drain_until:
            await asyncio.wait([drains], timeout=0.1)
        drains.cancel()

    async def _drain_gateway(self, watched: Watched, drain_s: float) -> None:
        with contextlib.suppress(ProcessGone):
            await watched.process.drain(drain_s)

    def why_waiting(self, watched: Watched) -> str:
        """What keeps a starting member from being placed, empty when nothing known does."""
        if watched.state is State.STARTING:
            return self._runtime.why_waiting(watched.launch)
        return ""

    # -- inside --------------------------------------------------------------------------------

    def _record(self, action: str, reason: str) -> None:
        log.info("%s: %s", action, reason)
        self.decisions.append(DecisionRecord(time.time(), action, reason))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def targets(spec: ClusterSpec) -> list[Target]:
    """The pools of `spec` as reconcile() wants them; gateways are one more pool."""
    pools = [
        Target(name, pool.role, pool.replicas, spec.pool_revision(name))
        for name, pool in spec.pools.items()
    ]
    gateway = Target(
        GATEWAY_POOL, GATEWAY_ROLE, spec.gateway.replicas, spec.gateway_revision(), surge=0
    )
    return [gateway, *pools]
