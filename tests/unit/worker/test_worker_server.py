"""Two whole workers in this process: real gRPC, a real (tiny) model, shared memory between them."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
import urllib3
from worker_kit import HASHER, PROMPT, ROOT, Gateway, Pair, config, connected, sequence, settled

from crossdock.engine.native import runner
from crossdock.prefill import role as prefill_worker
from crossdock.proto.errors import ConfigError, ModelError
from crossdock.proto.types import Role, SamplingParams
from crossdock.proto.v1 import inference_pb2, worker_pb2
from crossdock.worker.streams import GatewayStream


@pytest.fixture
async def pair(tiny_model: Path) -> AsyncIterator[Pair]:
    prefill = config("p", Role.PREFILL, tiny_model)
    decode = config("d", Role.DECODE, tiny_model)
    async with connected(prefill, decode) as made:
        yield made


async def test_hand_off_gives_the_tokens_of_one_engine(pair: Pair, tiny_model: Path) -> None:
    from offline import LLM

    first = await pair.first("s", PROMPT)
    rest = await pair.rest("s", PROMPT, first)
    tokens = [*first.token_ids, *(token for output in rest for token in output.token_ids)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (alone,) = LLM(str(tiny_model), num_blocks=32).generate([PROMPT], params)
    assert tokens == list(alone.token_ids)
    assert rest[0].transfer.blocks == 5 and rest[0].transfer.recomputed_tokens == 0
    assert rest[0].transfer.bytes == 5 * pair.decode.description.block_bytes
    assert all(len(output.logprobs) == 1 for output in [first, *rest])
    await settled(pair.prefill, pair.decode)


async def test_hello_has_the_description_and_the_cache(pair: Pair) -> None:
    assert pair.p.hello.hello == pair.prefill.public_description
    assert pair.p.hello.block_events.snapshot
    first = await pair.first("s", PROMPT)
    again = Gateway(pair.prefill.description.address)
    await again.connect()
    stored = [event.block_hash for event in again.hello.block_events.events if event.stored]
    assert stored == HASHER.chain(PROMPT, ROOT)
    await again.close()
    await pair.p.send(cancel=worker_pb2.CancelRequest(sequence_id=first.sequence_id))
    await settled(pair.prefill)


async def test_a_closed_stream_frees_what_its_gateway_had(pair: Pair) -> None:
    await pair.first("s", PROMPT)
    assert len((await pair.prefill.status()).leases) == 1
    await pair.p.close()
    await settled(pair.prefill)


async def test_a_worker_says_at_once_that_its_engine_hangs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def next_load(late: bool) -> worker_pb2.Load:
        async with asyncio.timeout(20):
            while True:
                load = (await pair.d._call.read()).load
                if load.late is late:
                    return load

    stuck, entered = threading.Event(), threading.Event()
    runner = pair.decode._loop._runner

    def hangs(plan: object) -> object:
        entered.set()
        stuck.wait(60)
        return run(plan)

    run = runner.run
    monkeypatch.setattr(runner, "run", hangs)
    monkeypatch.setattr(pair.decode._role, "expected_s", lambda plan: 0.01)
    try:
        await pair.d.send(decode=worker_pb2.DecodeRequest(sequence=sequence("s", PROMPT)))
        await asyncio.to_thread(entered.wait, 20)
        load = await next_load(late=True)
        assert (load.total_blocks, load.running) == (pair.decode.description.num_blocks, 0)
        assert load.age_s > 0, "the load is that from before the step"
        assert (await next_load(late=True)).age_s > load.age_s, "a heartbeat does not freshen it"
    finally:
        stuck.set()
    assert (await next_load(late=False)).age_s < 1.0


async def test_the_load_at_a_steps_end_counts_what_came_while_it_ran(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, entered = threading.Semaphore(0), threading.Event()
    run = pair.prefill._loop._runner.run

    def waits(plan: object) -> object:
        entered.set()
        steps.acquire(timeout=60)
        return run(plan)

    monkeypatch.setattr(pair.prefill._loop._runner, "run", waits)
    try:
        await pair.p.send(prefill=worker_pb2.PrefillRequest(sequence=sequence("a", PROMPT)))
        await asyncio.to_thread(entered.wait, 20)
        await pair.p.send(prefill=worker_pb2.PrefillRequest(sequence=sequence("b", PROMPT)))
        async with asyncio.timeout(20):
            while not pair.prefill._loop._commands:  # the stream has brought it
                await asyncio.sleep(0.01)
        steps.release()  # one: frames of those after it might be merged with what it says
        async with asyncio.timeout(20):
            while not (frame := await pair.p._call.read()).outputs:
                pass
    finally:
        steps.release(100)
    assert [output.sequence_id for output in frame.outputs] == ["a"]
    assert frame.load.waiting == 1 and frame.load.queued_tokens > 0


async def test_leases_are_renewed_and_released_by_call(pair: Pair) -> None:
    first = await pair.first("s", PROMPT)
    ids = [first.progress.ticket.ticket_id, b"?" * 16]
    answer = await pair.p.stub.RenewLeases(
        worker_pb2.RenewLeasesRequest(ticket_ids=ids, lease_ms=60_000)
    )
    assert list(answer.unknown_ticket_ids) == [b"?" * 16]
    (lease,) = (await pair.prefill.status()).leases
    assert 50 < lease.remaining_s <= 60
    await pair.p.stub.ReleaseTickets(worker_pb2.ReleaseTicketsRequest(ticket_ids=ids))
    await settled(pair.prefill)


@pytest.mark.parametrize("field", ["mac", "layout_hash", "incarnation", "generations"])
async def test_a_ticket_that_is_not_what_was_offered_is_refused(pair: Pair, field: str) -> None:
    first = await pair.first("s", PROMPT)
    if field == "generations":
        first.progress.ticket.generations[0] += 1
    else:
        setattr(first.progress.ticket, field, b"x" * len(getattr(first.progress.ticket, field)))
    (output,) = await pair.rest("s", PROMPT, first)
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    assert not output.token_ids
    await settled(pair.decode)


@pytest.mark.parametrize("changed", [0, len(PROMPT) - 1])
@pytest.mark.parametrize("hashes", ["its own", "the offer's"])
async def test_a_ticket_is_good_for_its_own_prompt_alone(
    pair: Pair, changed: int, hashes: str
) -> None:
    """Another of equal length would be answered from the KV of the first."""
    first = await pair.first("s", PROMPT)
    other = [*PROMPT]
    other[changed] += 1
    request = sequence("s", other, list(first.token_ids))
    if hashes == "the offer's":
        request.block_hashes[:] = HASHER.chain(PROMPT, ROOT)
    await pair.d.send(decode=worker_pb2.DecodeRequest(sequence=request, progress=first.progress))
    (output,) = [output async for output in pair.d.outputs("s")]
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    assert "offered for prompt" in output.error.message
    await settled(pair.decode)


async def test_a_ticket_is_good_for_blocks_hashed_as_the_offers_were(pair: Pair) -> None:
    """Otherwise its KV would be cached under the hashes of another prompt."""
    first = await pair.first("s", PROMPT)
    request = sequence("s", PROMPT, list(first.token_ids))
    request.block_hashes[:] = HASHER.chain([PROMPT[0] + 1, *PROMPT[1:]], ROOT)
    await pair.d.send(decode=worker_pb2.DecodeRequest(sequence=request, progress=first.progress))
    (output,) = [output async for output in pair.d.outputs("s")]
    assert "offered for prompt" in output.error.message


async def test_a_peer_that_leaves_while_it_is_met_fails_the_request(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropped in the middle of the introduction: the gateway must hear of it."""
    first = await pair.first("s", PROMPT)
    await pair.decode.update_peers([])
    met = asyncio.Event()

    async def never(*_: object) -> None:
        met.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(pair.decode.peer_calls, "_introduce", never)
    answer = asyncio.create_task(pair.rest("s", PROMPT, first))
    await met.wait()
    await pair.decode.update_peers([])
    (output,) = await answer
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    assert "left the cluster" in output.error.message
    await settled(pair.decode)


async def test_a_stream_that_ends_before_its_snapshot_is_forgotten(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateways, entered, left = pair.prefill._gateways, asyncio.Event(), asyncio.Event()
    opens, ended = gateways.open, gateways.ended

    def spied(gateway: str, wake: Callable[[], None]) -> GatewayStream:
        entered.set()
        return opens(gateway, wake)

    def over(stream: GatewayStream) -> None:
        ended(stream)
        left.set()

    monkeypatch.setattr(gateways, "open", spied)
    monkeypatch.setattr(gateways, "ended", over)
    stepping = threading.Event()
    pair.prefill.post(lambda role: stepping.wait(20))  # the engine is in a long step
    late = Gateway(pair.prefill.description.address)
    opening = asyncio.create_task(late.connect())
    await entered.wait()
    opening.cancel()
    await late.close()
    await left.wait()
    stepping.set()
    await pair.prefill.status()  # after the snapshot
    assert len(gateways._streams) == 1


async def test_a_gateways_stream_cannot_cancel_another_gateways_sequence(pair: Pair) -> None:
    other = Gateway(pair.prefill.description.address)
    await other.connect()
    first = await pair.first("s", PROMPT)
    await other.send(cancel=worker_pb2.CancelRequest(sequence_id="s", reason="not mine"))
    await other.send(prefill=worker_pb2.PrefillRequest(sequence=sequence("after", [])))
    assert [output.error.code async for output in other.outputs("after")]  # both were taken
    assert [lease.sequence_id for lease in (await pair.prefill.status()).leases] == ["s"]
    rest = await pair.rest("s", PROMPT, first)
    assert sum(len(output.token_ids) for output in rest) == 7
    await settled(pair.prefill, pair.decode)
    await other.close()


async def test_bad_requests_are_answered_and_start_nothing(pair: Pair) -> None:
    for name, ids in (("empty", []), ("range", [10**6]), ("long", [5] * 5000)):
        await pair.p.send(prefill=worker_pb2.PrefillRequest(sequence=sequence(name, ids)))
        (output,) = [output async for output in pair.p.outputs(name)]
        assert output.error.code == worker_pb2.ERROR_CODE_INVALID
        assert output.error.message.startswith("token_ids: ")
    await settled(pair.prefill)


async def test_a_token_that_is_none_ends_its_own_sequence_alone(pair: Pair) -> None:
    """A ticket's check hashes the tokens: what cannot be hashed must not end the stream."""
    first = await pair.first("s", PROMPT)
    request = sequence("bad", PROMPT, list(first.token_ids))
    request.token_ids[3] = -1
    await pair.d.send(decode=worker_pb2.DecodeRequest(sequence=request, progress=first.progress))
    (output,) = [output async for output in pair.d.outputs("bad")]
    assert output.error.code == worker_pb2.ERROR_CODE_INVALID
    assert output.error.message.startswith("token_ids: -1 ")
    assert (await pair.rest("s", PROMPT, first))[-1].finish_reason
    await settled(pair.prefill, pair.decode)


async def test_draining_ends_once_the_offer_is_read(pair: Pair) -> None:
    first = await pair.first("s", PROMPT)
    draining = asyncio.create_task(pair.prefill.drain(20))
    (refused,) = [o async for o in _refused(pair)]
    assert refused.error.code == worker_pb2.ERROR_CODE_DRAINING
    assert not draining.done()
    await pair.rest("s", PROMPT, first)
    assert await draining


async def _refused(pair: Pair) -> AsyncIterator[worker_pb2.SequenceOutput]:
    while True:
        await pair.p.send(prefill=worker_pb2.PrefillRequest(sequence=sequence("late", PROMPT)))
        outputs = [output async for output in pair.p.outputs("late")]
        if outputs[-1].finish_reason == inference_pb2.FINISH_REASON_ERROR:
            yield outputs[-1]
            return
        await pair.p.send(cancel=worker_pb2.CancelRequest(sequence_id="late"))


async def test_metrics_page_counts_what_was_moved(pair: Pair) -> None:
    first = await pair.first("s", PROMPT)
    await pair.rest("s", PROMPT, first)
    url = f"http://{pair.decode.description.metrics_address}/metrics"
    page = (await asyncio.to_thread(urllib3.request, "GET", url)).data.decode()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    labels = '{pool="decode",role="decode",worker="d"}'
    moved = 5 * pair.decode.description.block_bytes
    assert float(values[f"crossdock_worker_transferred_bytes_total{labels}"]) == moved
    assert float(values[f"crossdock_worker_recomputed_tokens_total{labels}"]) == 0


async def test_a_worker_that_cannot_start_says_why(tiny_model: Path, tmp_path: Path) -> None:
    taken = prefill_worker.create(config("p", Role.PREFILL, tiny_model))
    await taken.start()
    port = int(taken.description.address.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=r"port: .*in use"):
        await prefill_worker.create(config("q", Role.PREFILL, tiny_model, port=port)).start()
    await taken.stop()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    broken = prefill_worker.create(config("r", Role.PREFILL, tmp_path / "bad.gguf"))
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        await broken.start()
    await broken.stop()


async def test_checksums_of_a_gpu_need_cupy_before_the_first_prompt(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(runner, "resolve_device", lambda _: torch.device("cuda"))
    worker = prefill_worker.create(config("p", Role.PREFILL, tiny_model, verify="checksum"))
    with pytest.raises(ConfigError, match=r"^kv\.verify: .*cupy"):
        await worker.start()
    await worker.stop()
