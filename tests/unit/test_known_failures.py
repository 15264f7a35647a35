"""How systems of this kind have failed in public: one test for each, so that this one does not.

Those of the source, the wire and its library are in test_known_failures_wire.py, those of the
hand-off under load in test_known_failures_load.py. Numbers are those of public issue threads. What
does not apply, or not yet:

- Transfers that died after three days with corrupted tokens until both ends were restarted
  (vllm-backport#33): no test runs for days. What must hold then is tested in its parts: a broken
  connection is made again (test_kvtransfer_nixl.py), and the fence refuses what is not the
  offer's (below, and test_fence_nixl.py).
- Unlike tensor-parallel degrees that crash under load (sglang#15674): none are taken, by the file
  (test_vllm_args.py) and when two workers meet (test_kvtransfer_ranked.py).
- Blocks reserved on decode too early (sglang#40703, #27622): when to reserve is measured with the
  pull that begins while the prompt is computed.
- Pools of a fixed ratio (sglang-omni#1760, llm-d-autoscaling#1212): `crossdock scale` changes a
  ratio under load (test_cluster_ray.py); nothing follows the load by itself yet.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from gateway_rig import ask, collect, ids_of, start_rig, until
from handoff_kit import all_free, hand_off, pair, prefill, tokens_of
from roles_kit import Site, Worker, job, kv_of_tokens, undisturbed
from trust_kit import NO_AUTHORITY, Uncertified
from worker_kit import PROMPT as REAL_PROMPT
from worker_kit import Gateway, Pair, config, settled

from crossdock.decode import role as decode_worker
from crossdock.deploy.members import Watched, WatchSettings
from crossdock.deploy.reconcile import State
from crossdock.deploy.runtime import Launch, Placement, Started
from crossdock.prefill import role as prefill_worker
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc
from crossdock.worker import server as worker_server

PULL_FAILED = worker_pb2.ERROR_CODE_PULL_FAILED
PROMPT = [(11 * i) % 900 + 3 for i in range(60)]


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
async def real(tiny_model: Path) -> AsyncIterator[Pair]:
    """A prefill and a decode worker of this process, each with a gateway's stream."""
    workers = [
        prefill_worker.create(config("p", Role.PREFILL, tiny_model)),
        decode_worker.create(config("d", Role.DECODE, tiny_model)),
    ]
    endpoints = [await worker.start() for worker in workers]
    await workers[1].update_peers(endpoints)
    made = Pair(*workers)
    await made.p.connect()
    await made.d.connect()
    yield made
    for gateway in (made.p, made.d):
        await gateway.close()
    for worker in workers:
        await worker.stop()


def end_of(decode: Worker, sequence_id: str) -> worker_pb2.SequenceOutput:
    (last,) = [o for o in decode.take() if o.sequence_id == sequence_id and o.finish_reason]
    return last


# -- blocks and leases -------------------------------------------------------------------------

ABORTS: dict[str, Callable[[Site, Worker, str], None]] = {
    "cancelled": lambda site, d, name: d.role.cancel(name, "client went away", "gateway"),
    "gateway gone": lambda site, d, name: d.role.owner_gone("gateway"),
    "lease over": lambda site, d, name: _pass(site, d, 31),
    "deadline": lambda site, d, name: setattr(d.role.jobs[name], "deadline_unix_s", 1.0),
    "peer dead": lambda site, d, name: site.network.kill(
        next(i for i in site.network.transports if i != d.role.state.incarnation)
    ),
}


def _pass(site: Site, worker: Worker, seconds: float) -> None:
    site.clock.now += seconds


@pytest.mark.parametrize("state", ["waiting", "pulling", "fencing"])
@pytest.mark.parametrize("how", ABORTS)
def test_an_aborted_remote_load_leaves_no_block_behind(site: Site, state: str, how: str) -> None:
    """vllm#46283, #46289: every state that waits has an owner and a deadline."""
    p, d = site.worker(Role.PREFILL), site.worker(Role.DECODE, blocks=16)
    site.introduce(p, d)
    first = prefill(p, PROMPT)
    site.network.hold()
    busy = job([9] * 100, max_tokens=2, owner="another")
    if state == "waiting":  # for blocks
        d.role.submit(busy)
        d.turn()
    name = hand_off(d, PROMPT, first)
    d.turn()
    if state == "fencing":
        site.network.deliver(1)
        d.turn()
    ABORTS[how](site, d, name)
    d.turn(3)
    if not (how == "peer dead" and state == "waiting"):
        assert name not in d.role.jobs  # at once, whatever its transfer still does
    site.network.deliver()
    d.turn(4)
    all_free(d)
    if how != "peer dead":
        p.role.release_tickets([ticket_id for _, ticket_id in d.releases])
        all_free(p)


def test_leases_are_reaped_while_nothing_new_arrives(site: Site) -> None:
    """TensorRT-LLM#12313: cleanup ran only when new work was scheduled; a timer of its own."""
    site.clock = time.monotonic  # type: ignore[assignment]
    p = site.worker(Role.PREFILL, lease_s=0.1)
    pool = p.role.state.pool
    p.loop.start()
    p.loop.post(lambda: p.role.submit(job(PROMPT)))
    _wait_for(lambda: p.outputs)
    _wait_for(lambda: pool.num_used == 0)  # nobody said anything to the loop meanwhile
    p.loop.stop(10)
    all_free(p)


def _wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


async def test_a_worker_whose_engine_stands_still_does_not_pass_for_well(
    real: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM#12313: health said 200 over a pool that never recovered; progress is health."""
    monkeypatch.setattr(worker_server, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(worker_server, "STALLED_S", 0.2)
    endpoint, stuck = real.decode.endpoint, threading.Event()
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Process(Uncertified):
        async def start(self) -> object:
            return Started(1, "node", endpoint=endpoint)

        async def gone(self) -> str:
            return await ended

        async def stop(self, grace_s: float) -> None:
            assert grace_s == 0

    worker = real.decode.config
    launch = Launch("d", "decode", "decode", "", Placement(), {}, worker=worker)
    often = WatchSettings(probe_every_s=0.02, unresponsive_s=1.0)
    watched = Watched(launch, Process(), lambda: None, often, NO_AUTHORITY)  # type: ignore[arg-type]
    try:
        await until(lambda: watched.state is State.READY)
        assert await watched.status() is not None
        real.decode.post(lambda role: stuck.wait(60))
        # Gateways: heartbeats cease, which breaks their stream (LinkSettings.silence_s).
        end = time.monotonic() + 20
        with pytest.raises(TimeoutError):
            while time.monotonic() < end:
                await asyncio.wait_for(real.d._call.read(), 2.0)
        # The controller: its probes are answered by the engine thread alone.
        await until(lambda: watched.state is State.LOST)
        assert "did not answer" in watched.why
    finally:
        stuck.set()
        watched.release()


def test_a_lease_that_ran_out_while_decode_reads_serves_no_token(site: Site) -> None:
    """aws-do-eks#84: 8 of 42 answers came from freed blocks; validated after the read, closed."""
    p, d = pair(site, blocks=8)
    first = prefill(p, PROMPT)
    site.network.hold()
    name = hand_off(d, PROMPT, first)
    d.turn()
    site.clock.now += 31
    p.turn()  # reaped there; here it is believed to live on
    d.role.leases_renewed(({first.progress.ticket.ticket_id}, set()), site.clock.now + 100)
    for pull in ("read", "fence"):
        others = prefill(p, [5] * 60)  # which takes the same blocks and writes on them
        assert set(others.progress.ticket.block_ids) & set(first.progress.ticket.block_ids)
        site.network.deliver(1)
        p.role.release_tickets([others.progress.ticket.ticket_id])
        site.clock.now -= 25 if pull == "read" else 0  # the pull has time left
        d.turn()
    last = end_of(d, name)
    assert last.error.code == PULL_FAILED and "fence refused" in last.error.message
    assert not last.token_ids and d.role.state.counters.generated_tokens == 0
    all_free(p, d)


def test_an_offered_block_is_not_evicted_before_its_reader_is_done(site: Site) -> None:
    """TensorRT-LLM#12542: evicted before an asynchronous send; pinned until that is terminal."""
    p, d = site.worker(Role.PREFILL, blocks=10), site.worker(Role.DECODE)
    site.introduce(p, d)
    first = prefill(p, PROMPT)
    site.network.hold()
    hand_off(d, PROMPT, first)
    d.turn()
    rushing = [job([20 + i] * 30) for i in range(8)]  # more than fits beside the offer
    for one in rushing:
        p.role.submit(one)
    p.turn(30)
    assert len(p.take()) < len(rushing)
    offered = list(first.progress.ticket.block_ids)
    assert p.runner.kv_of(offered)[: len(PROMPT)].tolist() == kv_of_tokens(PROMPT).tolist()
    site.network.deliver()
    d.turn(12)
    assert tokens_of([first, *d.take()]) == undisturbed(PROMPT, 8)
    for _ in rushing:  # and the others get their turn
        p.turn(5)
        p.role.release_tickets([lease.ticket_id for lease in p.role.leases()])
    p.turn()
    all_free(p, d)


def test_a_timeout_frees_no_memory_that_is_still_written(site: Site) -> None:
    """TensorRT-LLM#14565, #13713: quiesce before reuse."""
    p, d = site.worker(Role.PREFILL), site.worker(Role.DECODE, blocks=12)
    site.introduce(p, d)
    first = prefill(p, PROMPT)
    site.network.hold()
    name = hand_off(d, PROMPT, first)
    d.turn()
    site.clock.now += 11
    d.turn()
    assert end_of(d, name).error.code == PULL_FAILED
    writable = set(range(12)) - {b for blocks in d.role.held() for b in blocks}
    other = job([9] * 20, max_tokens=8)
    d.role.submit(other)
    d.turn(3)
    assert set(other.sequence.block_table) <= writable
    site.network.deliver()  # the late bytes
    d.turn(12)
    assert tokens_of([o for o in d.take() if o.sequence_id == other.id]) == undisturbed([9] * 20, 8)
    p.turn()
    all_free(p, d)


def test_prefill_reclaims_what_no_decode_worker_ever_fetched(site: Site) -> None:
    """llm-d's notes on SGLang with NIXL: KV was held until a restart; lifetimes are the offer's."""
    p = site.worker(Role.PREFILL, lease_s=30)
    first = prefill(p, PROMPT)
    site.clock.now += 29.9
    p.turn()
    assert p.role.state.pool.num_used == len(first.progress.ticket.block_ids)
    assert p.role.next_deadline() == pytest.approx(site.clock.now + 0.1)
    site.clock.now += 0.1
    all_free(p)


# -- peers ---------------------------------------------------------------------------------------


async def test_a_worker_restarted_at_the_same_address_is_another_peer(
    real: Pair, tiny_model: Path
) -> None:
    """smg#2382, sglang#40108, nixl#1983: keyed by an incarnation, never by an address."""
    stale = await real.first("old", REAL_PROMPT)
    address = real.prefill.description.address
    await real.p.close()
    await real.prefill.stop()
    port = int(address.rpartition(":")[2])
    real.prefill = prefill_worker.create(config("p", Role.PREFILL, tiny_model, port=port))
    successor = await real.prefill.start()
    try:
        assert successor.address == address
        (refused,) = await real.rest("old", REAL_PROMPT, stale)  # not told of it yet
        assert refused.error.code == PULL_FAILED
        await real.decode.update_peers([successor])
        (refused,) = await real.rest("older", REAL_PROMPT, stale)
        assert refused.error.code == PULL_FAILED
        assert f"{address} is now {successor.incarnation}" in refused.error.message
        real.p = Gateway(address)
        await real.p.connect()
        fresh = await real.first("new", REAL_PROMPT)
        outputs = await real.rest("new", REAL_PROMPT, fresh)
        assert len(outputs) == 7 and not outputs[-1].HasField("error")
        await settled(real.prefill, real.decode)
    finally:
        await real.prefill.stop()


@pytest.mark.parametrize("what", ["crash", "mismatch"])
async def test_a_handshake_that_fails_is_of_its_request(
    real: Pair, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """vllm#26171, #33745: requests waited for ever, or the engine died."""
    await real.decode.update_peers([])
    first = await real.first("s", REAL_PROMPT)
    with monkeypatch.context() as patched:
        if what == "crash":

            def crash(*_: object) -> None:
                raise RuntimeError("the library fell over")

            patched.setattr(real.decode._transport, "add_peer", crash)
        else:
            real.prefill.description.layout.block_size = 32
        (failed,) = await asyncio.wait_for(real.rest("s", REAL_PROMPT, first), 20)
    assert failed.error.code == PULL_FAILED
    wanted = "the library fell over" if what == "crash" else "block_size is 16 here and 32 there"
    assert wanted in failed.error.message
    real.prefill.description.layout.block_size = 16
    outputs = await real.rest("again", REAL_PROMPT, first)  # the engine lives, and so does the peer
    assert len(outputs) == 7 and not outputs[-1].HasField("error")
    await settled(real.prefill, real.decode)


async def test_a_peer_that_leaves_while_it_is_asked_does_not_end_the_renewals(
    tiny_model: Path,
) -> None:
    """Akin to vllm#46283: a call to a peer is cancelled when its channel goes; others go on."""
    decode = decode_worker.create(config("d", Role.DECODE, tiny_model, lease_s=0.1))
    await decode.start()
    never = asyncio.Event()
    asked: list[list[bytes]] = []

    class Hangs(worker_pb2_grpc.WorkerServicer):
        async def RenewLeases(
            self, request: worker_pb2.RenewLeasesRequest, context: object
        ) -> worker_pb2.RenewLeasesResponse:
            asked.append(list(request.ticket_ids))
            await never.wait()
            raise AssertionError

    hung = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(Hangs(), hung)
    address = f"127.0.0.1:{hung.add_insecure_port('127.0.0.1:0')}"
    await hung.start()
    try:
        decode.post(lambda role: setattr(role, "waiting_tickets", lambda: [(address, b"t")]))
        await until(lambda: len(asked) == 1)
        await decode.update_peers([])  # it left: its channel is closed under the call
        await until(lambda: len(asked) >= 2)
    finally:
        never.set()
        await decode.stop()
        await hung.stop(0)


def test_a_failed_read_is_said_at_once(site: Site) -> None:
    """vllm#48633, #50754: notifications were counted and a failed post never came; failures are
    sent."""
    p, d = pair(site)
    first = prefill(p, PROMPT)
    site.network.fail_next_read("cable")
    name = hand_off(d, PROMPT, first)
    d.turn(2)  # no time passes
    last = end_of(d, name)
    assert (last.error.code, last.error.message) == (PULL_FAILED, "read failed: cable")
    p.role.release_tickets([ticket_id for _, ticket_id in d.releases])
    all_free(p, d)  # the prefill side heard of it too


async def test_a_failure_before_the_pull_reaches_the_client_as_a_longer_gap(
    tiny_model: Path,
) -> None:
    """vllm#48633: whoever waits for KV hears that none will come, and prefills elsewhere."""
    async with start_rig(tiny_model) as rig:
        rig.decodes[0].refusals.append(PULL_FAILED)
        answer = await collect(rig.stub.Generate(ask(max_tokens=6)))
        assert ids_of(answer) == list(range(10, 16))
        assert rig.metric("restarted_sequences_total", cause="pull failed") == 1
