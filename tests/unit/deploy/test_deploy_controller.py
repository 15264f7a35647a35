"""The controller over made-up processes: it starts, replaces, drains, adopts and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace

import pytest

from crossdock.deploy.admin_service import cluster_status
from crossdock.deploy.controller import Controller, ControllerSettings
from crossdock.deploy.members import Watched, WatchSettings
from crossdock.deploy.reconcile import State
from crossdock.deploy.runtime import (
    Launch,
    ProcessGone,
    Started,
    StartFailed,
    worker_launch,
)
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError
from crossdock.proto.types import Role, WorkerEndpoint

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


class FakeProcess:
    def __init__(self, cluster: FakeCluster, launch: Launch, number: int) -> None:
        self.cluster, self.launch, self.number = cluster, launch, number
        self.members: list[WorkerEndpoint] = []
        self.busy = asyncio.Event()  # set: has work that a drain waits for
        self.draining = False
        self.told: list[set[str]] = []
        self.slow_updates = 0  # so many of the next ones take their time
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def alive(self) -> bool:
        return not self._gone.done()

    def kill(self, why: str = "killed") -> None:
        self._gone.set_result(why)

    async def start(self) -> Started:
        if why := self.cluster.broken.get(self.launch.pool):
            raise StartFailed(why)
        await self.cluster.may_start.wait()
        await asyncio.sleep(0.01 * self.number)  # each in its own time
        launch, where = self.launch, f"127.0.0.1:{self.number}"
        common = (launch.name, launch.pool, launch.role, launch.revision, self.number, "node")
        if launch.gateway is not None:
            return Started(*common, grpc=launch.gateway["grpc"], http=launch.gateway["http"])
        role, incarnation = Role(launch.role), f"{self.number:032x}"
        endpoint = WorkerEndpoint(
            launch.name, launch.pool, role, where, incarnation, launch.revision
        )
        return Started(*common, endpoint=endpoint)

    async def gone(self) -> str:
        return await asyncio.shield(self._gone)

    async def update(self, endpoints) -> None:
        if not self.alive:
            raise ProcessGone("killed")
        if self.slow_updates:
            self.slow_updates -= 1
            await self.cluster.may_update.wait()
        self.members = list(endpoints)
        self.told.append({m.name for m in endpoints})

    async def drain(self, timeout_s: float) -> bool:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.busy.is_set():
                    await asyncio.sleep(0.005)
        return not self.busy.is_set()

    async def active_requests(self) -> int:
        return 0

    async def stop(self, grace_s: float = 5.0) -> None:
        if self.alive:
            self._gone.set_result("stopped")


class FakeCluster:
    """A Runtime whose processes outlive controllers, as detached actors do."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.broken: dict[str, str] = {}  # pool -> why its processes cannot start
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.may_update = asyncio.Event()
        self._numbers = itertools.count(1)

    async def launch(self, launch: Launch) -> FakeProcess:
        process = FakeProcess(self, launch, next(self._numbers))
        self.processes.append(process)
        return process

    async def adopt(self):
        return [(p.launch, p) for p in self.processes if p.alive]

    def why_waiting(self, launch: Launch) -> str:
        return ""

    def alive(self, pool: str) -> list[FakeProcess]:
        return [p for p in self.processes if p.alive and p.launch.pool == pool]


@pytest.fixture
async def cluster():
    return FakeCluster()


@pytest.fixture
def store(tmp_path):
    store = ClusterStore("test", tmp_path)
    store.begin(ClusterSpec.parse(YAML).to_yaml(), "life")
    return store


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


@pytest.fixture
async def controller(cluster, store):
    async with running(cluster, store) as controller:
        assert await controller.wait_converged(5)
        yield controller


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_all_start_together_and_are_told_of_each_other(cluster, store):
    cluster.may_start.clear()
    async with running(cluster, store) as controller:
        await until(lambda: len(cluster.processes) == 3)
        assert not controller.converged
        cluster.may_start.set()
        assert await controller.wait_converged(5)
    for process in cluster.processes:
        assert {m.name for m in process.members} == {"prefill-0", "decode-0"}


async def test_a_slow_update_never_overtakes_a_newer_membership(cluster, controller):
    """What a member was told last is the membership that is."""
    gateway = next(p for p in cluster.processes if p.launch.gateway is not None)
    gateway.slow_updates = 1
    controller.apply(controller.spec.with_replicas("decode", 2))
    await until(lambda: gateway.slow_updates == 0)
    controller.apply(controller.spec.with_replicas("decode", 3))
    await until(lambda: len(cluster.alive("decode")) == 3)
    await until(lambda: all(m.state is State.READY for m in controller.members))
    assert not controller.converged
    cluster.may_update.set()
    assert await controller.wait_converged(5)
    assert {m.name for m in gateway.members} == {"prefill-0", "decode-0", "decode-1", "decode-2"}


async def test_a_killed_worker_is_replaced_under_its_name_by_another_incarnation(
    cluster, controller
):
    [gateway] = cluster.alive("gateway")
    [victim] = cluster.alive("decode")
    before = {m.name: m.incarnation for m in gateway.members}
    victim.kill()
    await until(lambda: cluster.alive("decode") and controller.converged)
    after = {m.name: m.incarnation for m in gateway.members}
    assert after.keys() == before.keys()
    assert after["prefill-0"] == before["prefill-0"]
    assert after["decode-0"] != before["decode-0"]
    assert any("killed" in d.reason for d in controller.decisions)


async def test_only_workers_that_barely_served_are_a_crash_loop(cluster, controller):
    """One that served for longer than its start took is replaced at once, however often."""
    for _ in range(3):
        [victim] = cluster.alive("decode")
        [watched] = [m for m in controller.members if m.process is victim]
        await asyncio.sleep(2 * (watched.ready_at - watched.launched_at))
        victim.kill()
        await until(lambda: cluster.alive("decode") and controller.converged)
        assert controller._losses["decode"].count == 1
    cluster.may_start.clear()
    for count in (1, 2):  # the first of these had served
        await until(lambda: cluster.alive("decode"))
        cluster.alive("decode")[0].kill()
        await until(lambda count=count: controller._losses["decode"].count == count)


async def test_scaling_down_waits_for_the_work_of_who_goes(cluster, controller):
    bigger = controller.spec.with_replicas("decode", 2)
    assert controller.apply(bigger) == ["start decode-1: 2 wanted"]
    assert await controller.wait_converged(5)
    [going] = [p for p in cluster.alive("decode") if p.launch.name == "decode-1"]
    [gateway], [prefill] = cluster.alive("gateway"), cluster.alive("prefill")
    going.busy.set()
    controller.apply(controller.spec.with_replicas("decode", 1))
    await until(lambda: going.draining)
    assert {m.name for m in gateway.members} == {"prefill-0", "decode-0"}
    assert "decode-1" in {m.name for m in prefill.members}, "its tickets are still read"
    assert going.alive
    going.busy.clear()
    assert await controller.wait_converged(5)
    assert not going.alive
    assert "decode-1" not in {m.name for m in prefill.members}


async def test_a_drain_ends_at_its_deadline(cluster, controller):
    pools = dict(controller.spec.pools)
    pools["decode"] = replace(pools["decode"], replicas=2, drain_s=0.05)
    controller.apply(replace(controller.spec, pools=pools))
    assert await controller.wait_converged(5)
    [going] = [p for p in cluster.alive("decode") if p.launch.name == "decode-1"]
    going.busy.set()
    controller.apply(controller.spec.with_replicas("decode", 1))
    await until(lambda: not going.alive)
    assert any("deadline" in d.reason for d in controller.decisions)


async def test_a_restarted_controller_adopts_the_living_and_keeps_the_applied_spec(
    cluster, controller, store
):
    controller.apply(controller.spec.with_replicas("prefill", 2))
    assert await controller.wait_converged(5)
    before = list(cluster.processes)
    for process in before:
        process.told.clear()
    async with running(cluster, store) as another:
        assert await another.wait_converged(5)
        assert another.spec.pools["prefill"].replicas == 2
        assert cluster.processes == before, "nothing was started again"
        whole = {"prefill-0", "prefill-1", "decode-0"}
        assert all(p.told == [whole] for p in before), "a membership without the living"
        assert sum(d.action.startswith("adopt") for d in another.decisions) == 4
        assert another._key == controller._key


async def test_a_changed_setting_rolls_its_pool_and_no_other(cluster, controller):
    pools = dict(controller.spec.pools)
    pools["decode"] = replace(pools["decode"], max_batch=7)
    controller.apply(replace(controller.spec, pools=pools))
    assert await controller.wait_converged(5)
    [decode], [prefill] = cluster.alive("decode"), cluster.alive("prefill")
    assert decode.launch.worker.max_batch == 7
    assert prefill.launch.name == "prefill-0" and prefill.number <= 3


async def test_a_worker_that_cannot_start_is_named_with_its_reason(cluster, store):
    cluster.broken["decode"] = "ModelError: model.gguf is truncated"
    async with running(cluster, store) as controller:
        await until(lambda: "decode-0" in controller.errors)
        status = await cluster_status(controller)
        [decode] = [w for w in status.workers if w.pool == "decode"]
        assert decode.name == "decode-0" and "truncated" in decode.error
        assert decode.restarts >= 1
        assert not status.converged
        cluster.broken.clear()
        assert await controller.wait_converged(10)
        await until(lambda: not controller.errors)


async def test_a_worker_that_is_stopped_while_it_is_asked_has_no_status(cluster):
    """gRPC cancels the calls of a channel that is closed; whoever asked is not cancelled."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    process = await cluster.launch(
        worker_launch(ClusterSpec.parse(YAML), "decode", "d-0", bytes(32))
    )
    watched = Watched(process.launch, process, lambda: None, WatchSettings())
    await until(lambda: watched.started is not None)
    port = server.sockets[0].getsockname()[1]
    there = replace(watched.started.endpoint, address=f"127.0.0.1:{port}")
    watched.started = replace(watched.started, endpoint=there)
    asked = asyncio.create_task(watched.status())
    await asyncio.sleep(0.05)
    await watched.stop()
    assert await asked is None
    assert await watched.status() is None
    server.close()


async def test_gateways_take_ports_one_after_another(cluster, controller):
    controller.apply(replace(controller.spec, gateway=replace(controller.spec.gateway, replicas=2)))
    assert await controller.wait_converged(5)
    ports = sorted(g.launch.gateway["grpc"] for g in cluster.alive("gateway"))
    assert ports == ["127.0.0.1:50051", "127.0.0.1:50052"]
    [first] = [g for g in cluster.alive("gateway") if g.launch.gateway["grpc"] == ports[0]]
    first.kill()
    await until(lambda: len(cluster.alive("gateway")) == 2 and controller.converged)
    assert sorted(g.launch.gateway["grpc"] for g in cluster.alive("gateway")) == ports


async def test_what_cannot_change_is_refused_and_nothing_happens(cluster, controller):
    other = replace(controller.spec, model=replace(controller.spec.model, id="another"))
    with pytest.raises(ConfigError, match=r"model\.id: cannot change from 'any' to 'another'"):
        controller.apply(other)
    assert controller.spec.model.id == "any" and controller.converged


async def test_down_ends_everything_and_forgets_it(cluster, controller, store):
    [gateway] = cluster.alive("gateway")
    await controller.down(drain_s=0.05)
    assert not any(p.alive for p in cluster.processes)
    assert gateway.draining
    assert not store.folder.exists()


async def test_a_second_down_hurries_the_first(cluster, controller):
    [gateway] = cluster.alive("gateway")
    gateway.busy.set()
    slow = asyncio.create_task(controller.down(drain_s=3600))
    await until(lambda: gateway.draining)
    async with asyncio.timeout(2):
        await controller.down(drain_s=0)
        await slow
    assert not gateway.alive


def test_the_key_is_the_owners_alone(store):
    assert len(store.key()) == 32
    assert (store.folder / "key").stat().st_mode & 0o777 == 0o600


def test_a_life_begins_once_and_another_with_another_key(store):
    key = store.key()
    store.save_spec("changed since")
    store.begin("as first applied", "life")
    assert store.key() == key and store.spec() == "changed since"
    store.begin("as first applied", "next life")
    assert store.key() != key and store.spec() == "as first applied"


def test_one_name_one_cluster(store):
    other = ClusterStore("test", store.folder.parent.parent)
    with store.locked(), pytest.raises(ConfigError, match="served by another"), other.locked():
        pass
    with other.locked():
        pass
    assert not list(store.folder.parent.glob("*.lock"))
