"""Changes of a running cluster: of its gateways, and changes that meet."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from controller_kit import until, with_decode, with_gateway

from crossdock.deploy import admin, credentials
from crossdock.deploy.spec import ClusterSpec, PoolSpec
from crossdock.proto.channels import open_channel
from crossdock.proto.errors import ConfigError, Overtaken, Unavailable
from crossdock.proto.identity import CONTROLLER
from crossdock.proto.v1 import admin_pb2, admin_pb2_grpc


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


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "localhost"])
async def test_a_gateway_moves_to_another_host_of_the_same_ports(cluster, controller, host):
    """No two can have such addresses: the one that is tried takes free ports, then the old one
    makes room."""
    [old] = cluster.alive("gateway")
    addresses = {"grpc": f"{host}:50051", "http": f"{host}:8000"}
    await controller.change(lambda spec: with_gateway(spec, **addresses), "test")
    assert await controller.wait_converged(5)
    [new] = cluster.alive("gateway")
    assert new.serves and new.doors == set(addresses.values()) and not old.alive
    assert controller.restarts["gateway-0"] == controller.restarts["gateway-1"] == 0


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
    await until(lambda: controller.losses["decode"].count >= 3)
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


@pytest.mark.parametrize("removed", [True, False])
async def test_a_pool_that_is_wanted_no_more_makes_no_change_hopeless(cluster, controller, removed):
    good = controller.spec
    with_bad = {**good.pools, "bad": good.pools["decode"]}
    cluster.hopeless["bad"] = "ConfigError: kv_memory_mb: 1 holds no 2 blocks"
    controller.apply(replace(good, pools=with_bad))
    await until(lambda: controller.hopeless)
    changed = with_decode(good if removed else controller.spec, max_batch=7)
    if not removed:
        changed = changed.with_replicas("bad", 0)
    controller.apply(changed)
    assert not controller.hopeless and "bad-0" not in controller.errors
    assert await controller.wait_converged(5)


async def test_operators_at_once_and_what_they_are_told(cluster, controller, tmp_path, address):
    """Over gRPC, as `crossdock apply` and `scale` do it."""
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


async def test_gateways_take_ports_one_after_another(cluster, controller):
    controller.apply(replace(controller.spec, gateway=replace(controller.spec.gateway, replicas=2)))
    assert await controller.wait_converged(5)
    ports = sorted(g.launch.gateway.grpc for g in cluster.alive("gateway"))
    assert ports == ["127.0.0.1:50051", "127.0.0.1:50052"]
    [first] = [g for g in cluster.alive("gateway") if g.launch.gateway.grpc == ports[0]]
    first.kill()
    await until(lambda: len(cluster.alive("gateway")) == 2 and controller.converged)
    assert sorted(g.launch.gateway.grpc for g in cluster.alive("gateway")) == ports


async def test_what_cannot_change_is_refused_and_nothing_happens(cluster, controller):
    other = replace(controller.spec, model=replace(controller.spec.model, id="another"))
    with pytest.raises(ConfigError, match=r"model\.id: cannot change from 'any' to 'another'"):
        controller.apply(other)
    other = replace(controller.spec, kv=replace(controller.spec.kv, dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"kv\.dtype: cannot change from 'auto' to 'bfloat16'"):
        controller.apply(other)
    simulated = {
        name: replace(pool, engine=replace(pool.engine, kind="simulated"))
        for name, pool in controller.spec.pools.items()
    }
    with pytest.raises(ConfigError, match=r"engine\.kind: cannot change from 'native' to 'simul"):
        controller.apply(replace(controller.spec, pools=simulated))
    assert controller.spec.model.id == "any" and controller.converged
    # Nor by way of a spec that hands nothing over and was not carried out yet.
    controller.apply(replace(controller.spec, pools={"both": PoolSpec("colocated")}))
    with pytest.raises(ConfigError, match=r"engine\.kind: cannot change from 'native' to 'simul"):
        controller.apply(replace(controller.spec, pools=simulated))


async def test_waiting_for_a_change_is_no_decision(
    cluster, controller, tmp_path, monkeypatch, address
):
    """`apply` asks again while it waits; the status keeps the decisions that were made."""
    monkeypatch.setattr(admin, "PROGRESS_S", 0.05)
    cluster.may_start.clear()
    told: list[str] = []
    scaling = asyncio.create_task(
        asyncio.to_thread(admin.scale, "decode", 2, address, timeout_s=60, progress=told.append)
    )
    await until(lambda: told)
    await asyncio.sleep(0.3)
    cluster.may_start.set()
    assert (await scaling).converged
    by_scale = [d.reason for d in controller.decisions if d.action == "scale decode 2"]
    assert by_scale == ["1 actions due"]


async def test_a_cluster_that_goes_down_takes_no_change(cluster, controller, address):
    """However it was brought down: `crossdock up` calls the controller itself."""
    [gateway] = cluster.alive("gateway")
    gateway.busy.set()
    cluster.may_start.clear()
    told: list[str] = []
    waiting = asyncio.create_task(
        asyncio.to_thread(admin.scale, "decode", 2, address, timeout_s=5, progress=told.append)
    )
    await until(lambda: told)
    down = asyncio.create_task(controller.down(drain_s=3600))
    await until(lambda: gateway.draining)
    with pytest.raises(Unavailable, match="the cluster is going down"):
        await controller.change(lambda spec: with_decode(spec, max_batch=7), "test")
    assert controller.applied.generation == 2
    with pytest.raises(Unavailable, match="the cluster is going down"):
        await waiting
    gateway.busy.clear()
    await down


async def test_a_gateway_that_is_tried_when_the_cluster_goes_down_changes_nothing(
    cluster, controller, store
):
    cluster.may_start.clear()
    change = asyncio.create_task(
        controller.change(lambda spec: with_gateway(spec, policy="round_robin"), "test")
    )
    await until(lambda: len(cluster.alive("gateway")) == 2)
    await controller.down(drain_s=0)
    cluster.may_start.set()
    with pytest.raises(Unavailable, match="the cluster is going down"):
        await change
    assert not store.folder.exists()


async def test_the_shorter_drain_of_two_downs_is_kept(cluster, controller, address):
    [gateway] = cluster.alive("gateway")
    gateway.busy.set()
    operator = credentials.find(address)
    async with open_channel(address, operator, CONTROLLER) as channel, asyncio.timeout(5):
        stub = admin_pb2_grpc.AdminStub(channel)
        patient = stub.Down(admin_pb2.DownRequest(drain_s=3600))
        await until(lambda: gateway.draining)
        await stub.Down(admin_pb2.DownRequest(drain_s=0))
        await patient
    assert not gateway.alive


async def test_a_status_has_the_ports_of_each_node_where_it_is_asked_for_them(
    cluster, controller, address
):
    """One member looks at each node that the controller is not on."""
    plain = await asyncio.to_thread(admin.status, address)
    assert plain.local and not plain.nodes
    found = await asyncio.to_thread(admin.status, address, listening=True)
    ports = {node.node_id: [(p.process, p.host) for p in node.ports] for node in found.nodes}
    assert ports == {"head": [("controller", "127.0.0.1")], "node": [("fake", "0.0.0.0")]}
