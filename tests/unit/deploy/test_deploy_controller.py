"""The controller over made-up processes: it starts, replaces, drains, adopts and ends them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from controller_kit import YAML, running, until, with_decode, with_gateway
from trust_kit import AUTHORITY

from crossdock.cli_cluster import what_is_wrong
from crossdock.deploy import controller as controller_module
from crossdock.deploy.admin_service import cluster_status
from crossdock.deploy.members import Watched, WatchSettings
from crossdock.deploy.reconcile import State
from crossdock.deploy.runtime import Started, trial_launch, worker_launch
from crossdock.deploy.spec import ClusterSpec


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
        assert controller.losses["decode"].count == 1
    cluster.may_start.clear()
    for count in (1, 2):  # the first of these had served
        await until(lambda: cluster.alive("decode"))
        cluster.alive("decode")[0].kill()
        await until(lambda count=count: controller.losses["decode"].count == count)


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


async def test_who_was_leaving_goes_on_leaving_under_the_next_controller(cluster, store):
    """It refuses new work for good, so it can't count as ready."""
    async with running(cluster, store) as first:
        first.apply(first.spec.with_replicas("decode", 2))
        assert await first.wait_converged(5)
        [going] = [p for p in cluster.alive("decode") if p.launch.name == "decode-1"]
        going.busy.set()
        first.apply(first.spec.with_replicas("decode", 1))
        await until(lambda: going.draining)
    async with running(cluster, store) as second:
        second.apply(second.spec.with_replicas("decode", 2))
        await until(lambda: len(cluster.alive("decode")) == 3)
        [left] = [m for m in second.members if m.process is going]
        assert left.state is State.DRAINING and left.drain_deadline < float("inf")
        going.busy.clear()
        assert await second.wait_converged(5)
        assert not going.alive and len(cluster.alive("decode")) == 2


async def test_of_two_by_one_name_the_one_that_was_being_stopped_ends(cluster, store):
    """The earlier controller ended between the stop of one and that of its loop."""
    async with running(cluster, store) as first:
        assert await first.wait_converged(5)
    [kept] = cluster.alive("decode")
    stopping = await cluster.launch(kept.launch)
    stopping.draining = True
    async with running(cluster, store) as second:
        assert await second.wait_converged(5)
        assert cluster.alive("decode") == [kept] and not kept.draining
        assert not any(d.action.startswith("drain") for d in second.decisions)


async def test_a_trial_that_outlived_its_controller_ends(cluster, store):
    async with running(cluster, store) as first:
        assert await first.wait_converged(5)
        taken = frozenset(first.spec.gateway_addresses(0))
        tried = await cluster.launch(trial_launch(first.spec, taken, bytes(32), bytes(32)))
    async with running(cluster, store) as second:
        assert await second.wait_converged(5)
        assert not tried.alive and len(cluster.alive("gateway")) == 1
        assert not second.failure


async def test_a_process_tells_the_next_controller_that_it_was_told_to_leave(monkeypatch):
    module = pytest.importorskip("crossdock.deploy.ray.member")

    class Server:
        async def drain(self, timeout_s: float) -> bool:
            return timeout_s > 0

        async def stop(self) -> None:
            pass

    async def start(actor) -> Started:
        actor._server = Server()
        return Started(1, "node")

    monkeypatch.setattr(module, "set_up_process", lambda *_: None)
    monkeypatch.setattr(module.MemberActor, "_start", start)
    launch = worker_launch(ClusterSpec.parse(YAML), "decode", "decode-0", bytes(32))
    for leave in (lambda member: member.drain(1.0), lambda member: member.stop()):
        member = module.MemberActor(launch)
        assert not (await member.start()).leaving
        await leave(member)
        assert (await member.start()).leaving


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


async def test_a_worker_that_is_stopped_while_it_is_asked_has_no_status(cluster):
    """gRPC cancels the calls of a channel that is closed; whoever asked is not cancelled."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    process = await cluster.launch(
        worker_launch(ClusterSpec.parse(YAML), "decode", "d-0", bytes(32))
    )
    watched = Watched(process.launch, process, lambda: None, WatchSettings(), AUTHORITY)
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


async def test_down_ends_everything_and_forgets_it(cluster, controller, store):
    [gateway] = cluster.alive("gateway")
    await controller.down(drain_s=0.05)
    assert not any(p.alive for p in cluster.processes)
    assert gateway.draining
    assert not store.folder.exists()


async def test_down_waits_for_a_gateway_that_drains_already(cluster, controller):
    [old] = cluster.alive("gateway")
    old.busy.set()
    controller.apply(with_gateway(controller.spec, grpc="127.0.0.1:1", http="127.0.0.1:2"))
    await until(lambda: old.draining)
    asyncio.get_running_loop().call_later(0.2, old.busy.clear)
    await controller.down(drain_s=5)
    assert not old.alive and not old.cut_off


async def test_a_second_down_hurries_the_first(cluster, controller):
    [gateway] = cluster.alive("gateway")
    gateway.busy.set()
    slow = asyncio.create_task(controller.down(drain_s=3600))
    await until(lambda: gateway.draining)
    async with asyncio.timeout(2):
        await controller.down(drain_s=0)
        await slow
    assert not gateway.alive
