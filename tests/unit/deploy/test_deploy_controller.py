"""The controller over made-up processes: it starts, replaces, drains, adopts and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace

import pytest

from crossdock.cli_cluster import what_is_wrong
from crossdock.deploy import admin
from crossdock.deploy import controller as controller_module
from crossdock.deploy.admin_service import cluster_status, serve_admin
from crossdock.deploy.controller import Controller, ControllerSettings
from crossdock.deploy.members import Watched, WatchSettings
from crossdock.deploy.reconcile import State
from crossdock.deploy.runtime import (
    CannotStart,
    Launch,
    ProcessGone,
    Started,
    StartFailed,
    worker_launch,
)
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError, Overtaken
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
        self.serves = False
        self.slow_updates = 0  # so many of the next ones take their time
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def alive(self) -> bool:
        return not self._gone.done()

    @property
    def doors(self) -> set[str]:
        gateway = self.launch.gateway or {}
        doors = {gateway[door] for door in ("grpc", "http") if door in gateway}
        return {door for door in doors if not door.endswith(":0")}

    def kill(self, why: str = "killed") -> None:
        self._gone.set_result(why)

    async def start(self) -> Started:
        if why := self.cluster.broken.get(self.launch.pool):
            raise StartFailed(why)
        if why := self.cluster.hopeless.get(self.launch.pool):
            raise CannotStart(why)
        policy = (self.launch.gateway or {}).get("policy", "")
        if "trial" not in self.launch.name and policy in self.cluster.broken_gateways:
            raise StartFailed(self.cluster.broken_gateways[policy])
        await self.cluster.may_start.wait()
        await asyncio.sleep(0.01 * self.number)  # each in its own time
        launch, where = self.launch, f"127.0.0.1:{self.number}"
        others = [p for p in self.cluster.alive(launch.pool) if p is not self]
        if taken := self.doors & {door for other in others for door in other.doors}:
            raise CannotStart(f"ConfigError: {sorted(taken)} in use")
        self.serves = True
        common = (self.number, "node")
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
        self.hopeless: dict[str, str] = {}  # the same, for good
        self.refused: dict[str, str] = {}  # the same, by Ray
        self.broken_gateways: dict[str, str] = {}  # policy -> why, except in a trial
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.may_update = asyncio.Event()
        self._numbers = itertools.count(1)

    async def launch(self, launch: Launch) -> FakeProcess:
        if why := self.refused.get(launch.pool):
            raise CannotStart(f"Ray refuses it: {why}")
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


# -- failures of the controller itself -------------------------------------------------------


async def test_a_turn_that_fails_is_in_the_status_and_tried_again(cluster, controller, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(controller_module, "reconcile", broken)
    await until(lambda: controller.failure)
    cluster.alive("decode")[0].kill()
    status = await cluster_status(controller)
    assert not status.converged
    assert any("ZeroDivisionError: made up" in line for line in what_is_wrong(status))
    assert not await controller.wait_converged(0.05)
    monkeypatch.undo()
    assert await controller.wait_converged(5)
    assert cluster.alive("decode") and not controller.failure


async def test_adopting_is_tried_again_before_anything_is_started(cluster, store, monkeypatch):
    async with running(cluster, store) as first:
        assert await first.wait_converged(5)
    adopt = cluster.adopt

    async def broken():
        monkeypatch.setattr(cluster, "adopt", adopt)
        raise ConnectionError("no GCS")

    monkeypatch.setattr(cluster, "adopt", broken)
    async with running(cluster, store) as second:
        await until(lambda: "no GCS" in second.failure)
        assert await second.wait_converged(5)
    assert len(cluster.processes) == 3, "they were adopted, not started again"


async def test_what_ray_refuses_fails_its_pool_alone_until_the_spec_is_corrected(
    cluster, controller
):
    cluster.refused["decode"] = "the resources dictionary must not contain 'memory'"
    controller.apply(with_decode(controller.spec, max_batch=7))
    await until(lambda: controller.hopeless)
    assert not await controller.wait_converged(3600), "waiting would be in vain"
    [reason] = controller.hopeless
    assert reason.startswith("decode-1: Ray refuses it: the resources dictionary")
    status = await cluster_status(controller)
    assert any("Ray refuses it" in line for line in what_is_wrong(status))
    assert cluster.alive("decode"), "the old one serves on"
    cluster.alive("prefill")[0].kill()
    await until(lambda: len(cluster.alive("prefill")) == 1)
    cluster.refused.clear()
    controller.apply(with_decode(controller.spec, max_batch=8))
    assert await controller.wait_converged(5)


async def test_a_restarted_controller_reads_the_last_good_spec_where_the_newest_cannot_be(
    cluster, store
):
    async with running(cluster, store) as first:
        await until(lambda: first.applied.good)
        good, before = first.spec, list(cluster.processes)
    store.save_spec(store.spec().replace("decode:", "De_code:"), 2)
    async with running(cluster, store) as second:
        assert await second.wait_converged(5)
        assert second.spec == good
        assert "De_code" in second.applied.changed_by
    assert cluster.processes == before


# -- changes of the gateways -----------------------------------------------------------------


def with_gateway(spec: ClusterSpec, **fields) -> ClusterSpec:
    return replace(spec, gateway=replace(spec.gateway, **fields))


def with_decode(spec: ClusterSpec, **fields) -> ClusterSpec:
    return replace(spec, pools={**spec.pools, "decode": replace(spec.pools["decode"], **fields)})


async def test_gateway_settings_are_tried_before_the_old_gateway_goes(cluster, controller):
    [old] = cluster.alive("gateway")
    before = controller.spec
    cluster.hopeless["gateway"] = "ConfigError: max_body_bytes: too large"
    with pytest.raises(ConfigError, match=r"gateway: .*max_body_bytes: too large"):
        await controller.change(lambda spec: with_gateway(spec, policy="round_robin"), "test")
    assert old.alive and not old.draining
    assert controller.spec == before and controller.converged
    assert cluster.alive("gateway") == [old], "the one that was tried is gone"


async def test_a_gateway_that_does_not_start_is_rolled_back(cluster, controller):
    """What no trial can see: it fails only in its predecessor's place."""
    [old] = cluster.alive("gateway")
    before = controller.spec
    to = lambda spec: with_gateway(spec, policy="round_robin")  # noqa: E731
    cluster.broken_gateways["round_robin"] = "the port is another's"
    await controller.change(to, "test")
    with pytest.raises(Overtaken, match="did not start: the port is another's"):
        await controller.wait_converged(5, to)
    assert await controller.wait_converged(5)
    [gateway] = cluster.alive("gateway")
    assert controller.spec == before
    assert gateway.serves and gateway.doors == old.doors
    assert gateway.launch.revision == old.launch.revision


async def test_a_gateway_on_other_ports_serves_before_the_old_one_drains(cluster, controller):
    [old] = cluster.alive("gateway")
    old.busy.set()
    to = lambda spec: with_gateway(spec, grpc="127.0.0.1:1", http="127.0.0.1:2")  # noqa: E731
    await controller.change(to, "test")
    await until(lambda: old.draining)
    [new] = [p for p in cluster.alive("gateway") if p is not old]
    assert new.serves and new.doors == {"127.0.0.1:1", "127.0.0.1:2"}
    old.busy.clear()
    assert await controller.wait_converged(5)
    assert not old.alive


@pytest.mark.parametrize("http", ["127.0.0.1:8001", "127.0.0.1:7999", "127.0.0.1:8000"])
async def test_two_gateways_change_places(cluster, controller, http):
    """The first one's new port is the second one's old port, or the other way round."""
    controller.apply(with_gateway(controller.spec, replicas=2))
    assert await controller.wait_converged(5)
    controller.apply(with_gateway(controller.spec, http=http, policy="round_robin"))
    assert await controller.wait_converged(5)
    gateways = cluster.alive("gateway")
    wanted = {a for i in range(2) for a in controller.spec.gateway_addresses(i)}
    assert {door for g in gateways for door in g.doors} == wanted
    assert len(gateways) == 2 and all(g.serves for g in gateways)


# -- changes that meet -----------------------------------------------------------------------


async def test_a_change_of_an_older_generation_is_refused(cluster, controller):
    seen = controller.applied.generation
    await controller.change(lambda spec: with_decode(spec, replicas=2), "apply a.yaml", seen)
    with pytest.raises(Overtaken, match=r"generation 1 but of generation 2, made by apply a\.yaml"):
        await controller.change(lambda spec: with_decode(spec, max_batch=7), "apply b.yaml", seen)
    assert controller.spec.pools["decode"].replicas == 2
    same = await controller.change(lambda spec: with_decode(spec, replicas=2), "again", seen)
    assert same and controller.applied.generation == 2, "it has that change"


async def test_a_change_that_is_overtaken_says_so_and_one_that_is_kept_waits_on(
    cluster, controller
):
    cluster.may_start.clear()
    two = lambda spec: spec.with_replicas("decode", 2)  # noqa: E731
    three = lambda spec: spec.with_replicas("decode", 3)  # noqa: E731
    prefill = lambda spec: spec.with_replicas("prefill", 2)  # noqa: E731
    waits = []
    for to, by in ((two, "scale decode 2"), (prefill, "scale prefill 2"), (three, "scale 3")):
        await controller.change(to, by)
        waits.append(asyncio.create_task(controller.wait_converged(5, to)))
        await asyncio.sleep(0)
    with pytest.raises(Overtaken, match="overtaken by generation 4, made by scale 3"):
        await waits[0]
    cluster.may_start.set()
    assert await waits[1] and await waits[2]
    assert len(cluster.alive("decode")) == 3 and len(cluster.alive("prefill")) == 2


async def test_a_corrected_spec_does_not_wait_for_the_pause_of_the_old_one(cluster, controller):
    cluster.broken["decode"] = "out of memory"
    controller.apply(with_decode(controller.spec, kv_memory_mb=4_000_000))
    await until(lambda: controller._losses["decode"].count >= 3)
    waiting = "\n".join(controller.waiting_for())
    assert "decode pauses 2 s before its next start, after 3 losses in a row" in waiting
    assert "decode-1 is lost: out of memory" in waiting
    cluster.broken.clear()
    launched = len(cluster.processes)
    controller.apply(with_decode(controller.spec, kv_memory_mb=8))
    await controller.turn()
    assert len(cluster.processes) == launched + 1
    assert await controller.wait_converged(5)
    assert controller.waiting_for() == []


async def test_operators_at_once_and_what_they_are_told(cluster, controller, tmp_path):
    """Over gRPC, as `crossdock apply` and `scale` do it."""
    server, address = await serve_admin(controller, "127.0.0.1:0")
    file = tmp_path / "c.yaml"

    def apply(spec: ClusterSpec, progress=lambda line: None):
        file.write_text(spec.to_yaml())
        return asyncio.to_thread(admin.apply, file, address, timeout_s=60, progress=progress)

    cluster.hopeless["decode"] = "ConfigError: kv_memory_mb: 1 holds no 2 blocks"
    reply = await apply(with_decode(controller.spec, kv_memory_mb=1))
    assert not reply.converged
    assert list(reply.hopeless) == ["decode-1: ConfigError: kv_memory_mb: 1 holds no 2 blocks"]
    cluster.hopeless.clear()
    cluster.may_start.clear()
    told: list[str] = []
    first = asyncio.create_task(apply(with_decode(controller.spec, kv_memory_mb=9), told.append))
    await until(lambda: told)
    assert any("is starting" in line for line in told)
    second = asyncio.create_task(apply(with_decode(controller.spec, kv_memory_mb=10)))
    with pytest.raises(Overtaken, match=r"generation 4, made by apply .*c.yaml"):
        await first
    cluster.may_start.set()
    assert (await second).converged
    assert (await asyncio.to_thread(admin.scale, "decode", 2, address)).generation == 5
    await server.stop(0)


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
    store.save_spec("changed since", 2)
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
