"""A controller over a cluster of fake processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace

from trust_kit import Applies

from crossdock.deploy.controller import Controller, ControllerSettings
from crossdock.deploy.listening import Listening
from crossdock.deploy.members import WatchSettings
from crossdock.deploy.runtime import (
    CannotStart,
    Launch,
    Membership,
    ProcessGone,
    Started,
    StartFailed,
)
from crossdock.deploy.spec import ClusterSpec
from crossdock.proto.settings import overlap
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.router.dispatch.traffic import Traffic
from crossdock.router.serving import Serving

YAML = """
metadata: {name: test}
model: {id: any}
gateway: {grpc: "127.0.0.1:50051", http: "127.0.0.1:8000"}
pools:
  prefill: {role: prefill}
  decode: {role: decode}
"""
SETTINGS = ControllerSettings(
    turn_s=0.02, watch=WatchSettings(probe_every_s=0.02, unresponsive_s=1e9, stop_grace_s=0.1)
)


class FakeProcess(Applies):
    def __init__(self, cluster: FakeCluster, launch: Launch, number: int) -> None:
        super().__init__()
        self.cluster, self.launch, self.number = cluster, launch, number
        self.members: list[WorkerEndpoint] = []
        self.busy = asyncio.Event()  # set: has work that a drain waits for
        self.draining = False
        self.cut_off = False  # stopped with work left
        self.told: list[set[str]] = []
        self.serves = False
        self.was: list[str] = []  # its names before it changed its role
        self.served = Traffic()  # what a gateway has counted
        self.deaf = False  # does not say it
        self.explained: dict[str, bytes] = {}  # what a gateway knows, by request id
        self.serving: Serving | None = None  # what a gateway was told of models
        self.slow_updates = 0  # so many of the next ones take their time
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def alive(self) -> bool:
        return not self._gone.done()

    @property
    def doors(self) -> set[str]:
        gateway = self.launch.gateway
        return {gateway.grpc, gateway.http} if gateway else set()

    def kill(self, why: str = "killed") -> None:
        self._gone.set_result(why)

    async def start(self) -> Started:
        if why := self.cluster.broken.get(self.launch.pool):
            raise StartFailed(why)
        if why := self.cluster.hopeless.get(self.launch.pool):
            raise CannotStart(why)
        policy = self.launch.gateway.policy if self.launch.gateway else ""
        if "trial" not in self.launch.name and policy in self.cluster.broken_gateways:
            raise StartFailed(self.cluster.broken_gateways[policy])
        await self.cluster.may_start.wait()
        await asyncio.sleep(0.01 * self.number)  # each in its own time
        launch, where = self.launch, f"127.0.0.1:{self.number}"
        others = [p for p in self.cluster.alive(launch.pool) if p is not self]
        theirs = {door for other in others for door in other.doors}
        if taken := [mine for mine in self.doors if any(overlap(mine, door) for door in theirs)]:
            raise CannotStart(f"ConfigError: {sorted(taken)} in use")
        self.serves = True
        common = {"pid": self.number, "node_id": "node", "leaving": self.draining}
        if launch.gateway is not None:
            return Started(**common, grpc=launch.gateway.grpc, http=launch.gateway.http)
        role, incarnation = Role(launch.role), f"{self.number:032x}"
        endpoint = WorkerEndpoint(
            launch.name, launch.pool, role, where, incarnation, launch.revision
        )
        return Started(**common, endpoint=endpoint)

    async def gone(self) -> str:
        return await asyncio.shield(self._gone)

    async def update(self, members: Membership) -> None:
        endpoints, self.serving = members.endpoints, members.serving
        if not self.alive:
            raise ProcessGone("killed")
        if self.slow_updates:
            self.slow_updates -= 1
            await self.cluster.may_update.wait()
        self.members = list(endpoints)
        self.told.append({m.name for m in endpoints})

    async def become(self, launch: Launch) -> Started:
        if why := self.cluster.unable.get(launch.pool):
            raise StartFailed(why)
        self.was.append(self.launch.name)
        self.launch, self.draining = launch, False
        assert self.identities[-1].peer.name == launch.name
        return await self.start()

    async def drain(self, timeout_s: float, stays: bool = False) -> bool:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.busy.is_set():
                    await asyncio.sleep(0.005)
        return not self.busy.is_set()

    async def active_requests(self) -> int:
        return 0

    async def traffic(self) -> dict[str, Traffic]:
        if self.deaf:
            raise ProcessGone("deaf")
        return {"": self.served}

    async def explain(self, request_id: str) -> bytes:
        if self.deaf:
            raise ProcessGone("deaf")
        return self.explained.get(request_id, b"")

    async def listening(self) -> list[Listening]:
        return [Listening("fake", self.number, "0.0.0.0", self.number)]

    async def stop(self, grace_s: float = 5.0) -> None:
        if self.alive:
            self.cut_off = self.busy.is_set()
            self._gone.set_result("stopped")


class FakeCluster:
    """A Runtime whose processes outlive controllers, as detached actors do."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.broken: dict[str, str] = {}  # pool -> why its processes cannot start
        self.hopeless: dict[str, str] = {}  # the same, for good
        self.unable: dict[str, str] = {}  # pool -> why no worker can change into one of it
        self.refused: dict[str, str] = {}  # the same, by Ray
        self.broken_gateways: dict[str, str] = {}  # policy -> why, except in a trial
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.may_update = asyncio.Event()
        self._numbers = itertools.count(1)
        self.local = True

    async def launch(self, launch: Launch) -> FakeProcess:
        if why := self.refused.get(launch.pool):
            raise CannotStart(f"Ray refuses it: {why}")
        process = FakeProcess(self, launch, next(self._numbers))
        self.processes.append(process)
        return process

    async def adopt(self):
        return [(p.launch, p) for p in self.processes if p.alive]

    def listening(self) -> tuple[str, list[Listening]]:
        return "head", [Listening("controller", 1, "127.0.0.1", 1)]

    def why_waiting(self, launch: Launch) -> str:
        return ""

    def alive(self, pool: str) -> list[FakeProcess]:
        return [p for p in self.processes if p.alive and p.launch.pool == pool]


@contextlib.asynccontextmanager
async def running(cluster, store):
    controller = Controller(cluster, store, SETTINGS)
    loop = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        loop.cancel()
        for watched in controller.members:
            watched.release()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def with_gateway(spec: ClusterSpec, **fields) -> ClusterSpec:
    return replace(spec, gateway=replace(spec.gateway, **fields))


def with_decode(spec: ClusterSpec, **fields) -> ClusterSpec:
    return replace(spec, pools={**spec.pools, "decode": replace(spec.pools["decode"], **fields)})
