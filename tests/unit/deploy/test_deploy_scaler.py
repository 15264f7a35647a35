"""The controller sizes autoscaled pools: it looks, decides, carries out, and tells."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from controller_kit import FakeCluster, FakeProcess, running, until

from crossdock.deploy import metrics
from crossdock.deploy.admin_service import cluster_status
from crossdock.deploy.autoscaling.settings import PoolAutoscale
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError
from crossdock.proto.v1 import worker_pb2
from crossdock.router.dispatch.traffic import Traffic

YAML = """
metadata: {name: test}
model: {id: any}
gateway: {grpc: "127.0.0.1:50051", http: "127.0.0.1:8000", replicas: 2}
autoscale: {interval_s: 0.1}
pools:
  prefill: {role: prefill, replicas: 2, autoscale: {min: 1, max: 8}}
  decode: {role: decode, replicas: 2, autoscale: {min: 1, max: 8}, chunk_tokens: 128}
"""
BY_HAND = YAML.replace("interval_s: 0.1", "interval_s: 60, down_s: 30")
LOAD = worker_pb2.Load(
    prefill_tokens_per_s=5000, prefill_base_s=0.005, step_base_s=0.01, step_per_sequence_s=0.0005
)


def store_of(folder, yaml: str = YAML) -> ClusterStore:
    store = ClusterStore("test", folder)
    store.begin(ClusterSpec.parse(yaml).to_yaml(), "life")
    return store


def gateways(cluster: FakeCluster) -> list[FakeProcess]:
    return cluster.alive("gateway")


def serve(process: FakeProcess, sequences: int, in_time: bool = True) -> None:
    """So many more sequences of 1,000 and 100 tokens."""
    process.served += Traffic(
        arrived=sequences,
        started=sequences,
        ttft_met=sequences * in_time,
        prompt_tokens=1000 * sequences,
        uncached_squares=1000**2 * sequences,
        finished=sequences,
        tpot_met=sequences,
        generated_tokens=100 * sequences,
    )


class Clocked:
    """A controller whose autoscaler decides when it is told to, 10 s after the decision before."""

    def __init__(self, controller, cluster) -> None:
        self.controller, self.cluster, self.now = controller, cluster, 0.0
        controller.scaler.clock = lambda: self.now

    async def decide(self, rate: float = 0.0, **how) -> dict[str, int]:
        """After ten seconds at a rate."""
        for member in self.controller.members:
            if not member.is_gateway:
                member.load = LOAD
        for gateway in gateways(self.cluster):
            serve(gateway, round(10 * rate / len(gateways(self.cluster))), **how)
        self.now += 10.0
        await self.controller.scaler.decide()
        return {each.pool: each.target for each in self.controller.scaler.status()}


@pytest.fixture
async def clocked(tmp_path):
    cluster, store = FakeCluster(), store_of(tmp_path, BY_HAND)
    async with running(cluster, store) as controller:
        assert await controller.wait_converged(5)
        yield Clocked(controller, cluster)


async def test_a_load_that_grows_starts_workers_and_one_that_shrinks_drains_them(clocked):
    controller, cluster = clocked.controller, clocked.cluster
    await clocked.decide()
    for _ in range(5):
        await clocked.decide(5)
    sizes = await clocked.decide(30)
    assert sizes["prefill"] >= 6
    await until(lambda: len(cluster.alive("prefill")) == sizes["prefill"])
    assert await controller.wait_converged(5)
    for _ in range(40):
        sizes = await clocked.decide(1)
    assert sizes == {"prefill": 1, "decode": 1}
    await until(lambda: len(cluster.alive("prefill")) == len(cluster.alive("decode")) == 1)
    told = [d for d in controller.decisions if d.action.startswith("autoscale prefill 2 -> ")]
    assert told and "sequences/s" in told[0].reason


async def test_the_first_look_and_half_a_look_decide_nothing(clocked):
    await clocked.decide(30)  # counted before the first look
    assert not clocked.controller.scaler.decision.pools
    gateways(clocked.cluster)[0].deaf = True
    await clocked.decide(30)
    assert not clocked.controller.scaler.decision.pools
    gateways(clocked.cluster)[0].deaf = False
    await clocked.decide(30)
    [prefill, _] = clocked.controller.scaler.decision.pools
    assert "30 now" in prefill.reason  # both intervals, over both


async def test_a_gateway_that_began_anew_is_counted_from_its_start(clocked):
    for _ in range(3):
        await clocked.decide(10)
    process = gateways(clocked.cluster)[0]
    process.served = Traffic()
    await clocked.decide(10)
    assert "10 now" in clocked.controller.scaler.decision.pools[0].reason


async def test_a_dry_run_says_and_does_nothing(tmp_path):
    cluster = FakeCluster()
    yaml = BY_HAND.replace("down_s", "dry_run: true, down_s")
    async with running(cluster, store_of(tmp_path, yaml)) as controller:
        assert await controller.wait_converged(5)
        clocked = Clocked(controller, cluster)
        for _ in range(4):
            sizes = await clocked.decide(30)
        assert sizes["prefill"] > 2
        assert controller.converged and len(cluster.alive("prefill")) == 2
        said = [d.action for d in controller.decisions if d.action.startswith("dry run")]
        assert len([each for each in said if "prefill" in each]) == 1
        status = await cluster_status(controller)
        assert all(each.dry_run for each in status.autoscaled)


async def test_a_restarted_controller_goes_on_with_the_sizes(tmp_path):
    cluster, store = FakeCluster(), store_of(tmp_path, BY_HAND)
    async with running(cluster, store) as controller:
        assert await controller.wait_converged(5)
        clocked = Clocked(controller, cluster)
        for _ in range(4):
            sizes = await clocked.decide(30)
        assert sizes["prefill"] > 4
        assert await controller.wait_converged(5)
    again = ClusterStore("test", tmp_path)
    async with running(cluster, again) as controller:
        assert await controller.wait_converged(5)
        assert len(cluster.alive("prefill")) == sizes["prefill"]
        clocked = Clocked(controller, cluster)
        for _ in range(3):  # it learns anew, and takes nobody away meanwhile
            assert (await clocked.decide(2))["prefill"] == sizes["prefill"]


async def test_new_bounds_hold_at_once_and_a_fixed_pool_is_as_its_spec_says(clocked):
    controller, cluster = clocked.controller, clocked.cluster
    wider = BY_HAND.replace("replicas: 2, autoscale: {min: 1, max: 8}}", "X", 1)
    controller.apply(
        ClusterSpec.parse(wider.replace("X", "replicas: 4, autoscale: {min: 4, max: 8}}"))
    )
    await until(lambda: len(cluster.alive("prefill")) == 4)
    await clocked.decide()
    for _ in range(3):
        await clocked.decide(30)
    controller.apply(ClusterSpec.parse(wider.replace("X", "replicas: 3}")))
    await until(lambda: controller.converged and len(cluster.alive("prefill")) == 3)
    await clocked.decide()
    controller.apply(
        ClusterSpec.parse(wider.replace("X", "replicas: 5, autoscale: {min: 1, max: 8}}"))
    )
    await until(lambda: len(cluster.alive("prefill")) == 5)  # not as it was before it was fixed
    with pytest.raises(ConfigError, match="'decode' has no fixed size"):
        await controller.change(lambda spec: spec.with_replicas("decode", 3), "test")


async def test_starts_are_measured_and_those_of_adopted_workers_are_not(tmp_path):
    cluster, store = FakeCluster(), store_of(tmp_path, BY_HAND)
    async with running(cluster, store) as controller:
        assert await controller.wait_converged(5)
        assert all(m.start_s is not None and m.start_s < 5 for m in controller.members)
        clocked = Clocked(controller, cluster)
        await clocked.decide(1)
        await clocked.decide(1)
        assert controller.scaler._state.pools["prefill"].start_s < 5
    async with running(cluster, ClusterStore("test", tmp_path)) as controller:
        assert await controller.wait_converged(5)
        assert [m.name for m in controller.members if m.start_s is not None] == []


ALIKE = BY_HAND.replace(", chunk_tokens: 128", "")


async def resized(controller, **sizes: int) -> None:
    def changed(spec: ClusterSpec) -> ClusterSpec:
        pools = {
            name: replace(pool, replicas=sizes.get(name, pool.replicas), autoscale=PoolAutoscale())
            for name, pool in spec.pools.items()
        }
        return replace(spec, pools=pools)

    await controller.change(changed, "test")


async def test_a_worker_changes_its_role_and_everyone_hears_of_it(tmp_path):
    cluster = FakeCluster()
    async with running(cluster, store_of(tmp_path, ALIKE)) as controller:
        assert await controller.wait_converged(5)
        before = {process.number for process in cluster.processes}
        watched = next(m for m in controller.members if m.name == "decode-1")
        start_s = watched.start_s
        busy = next(p for p in cluster.processes if p.launch.name == "decode-1")
        busy.busy.set()
        await resized(controller, prefill=3, decode=1)
        await until(lambda: busy.draining)
        turning = next(m for m in controller.members if m.name == "prefill-2")
        assert (turning.state, turning.pool, turning.role) == ("flipping", "prefill", "prefill")
        status = await cluster_status(controller)
        assert {w.name: w.state for w in status.workers}["prefill-2"] == "flipping"
        gateway, worker = gateways(cluster)[0], cluster.alive("prefill")[0]
        await until(lambda: "decode-1" not in {m.name for m in gateway.members})
        assert "decode-1" in {m.name for m in worker.members}, "what it offered can be read"
        busy.busy.clear()
        assert await controller.wait_converged(5)
        assert {process.number for process in cluster.processes} == before, "nobody was started"
        assert busy.was == ["decode-1"] and busy.launch.worker.role == "prefill"
        assert watched.name == "prefill-2" and watched.start_s == start_s, "it was not started"
        found = {m.name: m.role for m in gateway.members}
        assert found["prefill-2"] == "prefill" and "decode-1" not in found
        assert {m.name for m in busy.members} == set(found)
        [told] = [d for d in controller.decisions if d.action.startswith("flip")]
        assert (told.action, told.reason) == (
            "flip decode-1 into prefill-2",
            "3 wanted here, 1 in decode",
        )


async def test_a_role_that_cannot_be_changed_costs_a_start_and_no_more(tmp_path):
    cluster = FakeCluster()
    async with running(cluster, store_of(tmp_path, ALIKE)) as controller:
        assert await controller.wait_converged(5)
        cluster.unable["prefill"] = "work is left that does not end"
        await resized(controller, prefill=3, decode=1)
        assert await controller.wait_converged(5)
        assert len(cluster.alive("prefill")) == 3 and len(cluster.alive("decode")) == 1
        assert sum(not process.alive for process in cluster.processes) == 1


async def test_a_worker_that_dies_while_it_changes_its_role_is_replaced_in_its_new_one(tmp_path):
    cluster = FakeCluster()
    async with running(cluster, store_of(tmp_path, ALIKE)) as controller:
        assert await controller.wait_converged(5)
        busy = next(p for p in cluster.processes if p.launch.name == "decode-1")
        busy.busy.set()
        await resized(controller, prefill=3, decode=1)
        await until(lambda: busy.draining)
        busy.kill()
        assert await controller.wait_converged(5)
        assert {p.launch.name for p in cluster.alive("prefill")} == {
            *("prefill-0", "prefill-1", "prefill-2")
        }


async def test_a_change_of_roles_that_a_controller_did_not_end_becomes_a_drain(tmp_path):
    cluster, store = FakeCluster(), store_of(tmp_path, ALIKE)
    async with running(cluster, store) as controller:
        assert await controller.wait_converged(5)
        busy = next(p for p in cluster.processes if p.launch.name == "decode-1")
        busy.busy.set()
        await resized(controller, prefill=3, decode=1)
        await until(lambda: busy.draining)
        for task in controller._background:
            task.cancel()
    busy.busy.clear()
    async with running(cluster, ClusterStore("test", tmp_path)) as controller:
        assert await controller.wait_converged(5)
        assert len(cluster.alive("prefill")) == 3 and len(cluster.alive("decode")) == 1
        assert not busy.alive


async def test_the_autoscaler_has_workers_change_roles(tmp_path):
    cluster = FakeCluster()
    yaml = ALIKE.replace("decode, replicas: 2", "decode, replicas: 6")
    async with running(cluster, store_of(tmp_path, yaml)) as controller:
        assert await controller.wait_converged(5)
        before = len(cluster.processes)
        clocked = Clocked(controller, cluster)
        await clocked.decide()
        await clocked.decide(5)
        sizes = await clocked.decide(15)
        moved = 6 - sizes["decode"]
        assert sizes["prefill"] - 2 >= moved > 0
        assert await controller.wait_converged(5)
        assert len(cluster.processes) == before + sizes["prefill"] - 2 - moved
        assert len(cluster.alive("prefill")) == sizes["prefill"]
        assert sum(d.action.startswith("flip decode-") for d in controller.decisions) == moved


async def test_it_decides_by_itself(tmp_path):
    cluster = FakeCluster()
    async with running(cluster, store_of(tmp_path)) as controller:
        assert await controller.wait_converged(5)
        await until(lambda: controller.scaler.decision.pools)
        for gateway in gateways(cluster):
            serve(gateway, 1000, in_time=False)
        for member in controller.members:
            member.load = LOAD
        await until(lambda: len(cluster.alive("prefill")) > 2)


async def test_status_and_metrics_show_it(clocked):
    controller = clocked.controller
    controller.metrics_address = metrics.serve(controller, "127.0.0.1")
    for _ in range(4):
        sizes = await clocked.decide(30)
    status = await cluster_status(controller)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", status.metrics_address)
    prefill = next(each for each in status.autoscaled if each.pool == "prefill")
    assert (prefill.least, prefill.most, prefill.target) == (1, 8, sizes["prefill"])
    assert 0 < prefill.floor <= prefill.keep and "busy with prompts" in prefill.reason
    shown = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.ControllerCollector(controller).collect()
        for sample in family.samples
    }
    assert shown["crossdock_autoscale_target", "prefill"] == sizes["prefill"]
    assert shown["crossdock_autoscale_changes_total", "prefill", "forecast"] >= 1
    assert shown["crossdock_members", "gateway", "ready"] == 2
