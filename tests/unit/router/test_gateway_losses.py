"""Workers that fail under a gateway's requests, over real gRPC, before fake workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_rig import PROMPT, Rig, ask, collect, ids_of, start_rig, trailer, until

from crossdock.proto.v1 import worker_pb2


async def test_a_preempted_sequence_goes_on_with_the_same_stream(rig: Rig) -> None:
    rig.decodes[0].fail_after = {7: worker_pb2.ERROR_CODE_PREEMPTED}
    request = ask(PROMPT, max_tokens=30, seed=4, logprobs=1)
    responses = await collect(rig.stub.Generate(request))
    assert ids_of(responses) == PROMPT[:30]
    logprobs = [entry.chosen.logprob for r in responses for entry in r.logprobs]
    assert logprobs == [-0.25 - k for k in range(30)]
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (40, 30)
    again = rig.prefills[0].prefills[1].sequence
    assert list(again.token_ids) == PROMPT + PROMPT[:7]
    assert (again.prompt_tokens, again.sampling.seed) == (40, 4)
    assert list(again.block_hashes) == rig.hashes(PROMPT + PROMPT[:7])
    assert again.sequence_id != rig.prefills[0].prefills[0].sequence.sequence_id
    assert rig.metric("restarted_sequences_total", cause="preempted") == 1
    await until(lambda: rig.idle)


async def test_a_restart_keeps_the_arrival_of_its_request(rig: Rig) -> None:
    rig.decodes[0].fail_after = {7: worker_pb2.ERROR_CODE_PREEMPTED}
    before = time.time()
    await collect(rig.stub.Generate(ask(PROMPT, max_tokens=10)))
    arrivals = [p.sequence.arrival_unix_s for p in rig.prefills[0].prefills]
    arrivals += [d.sequence.arrival_unix_s for d in rig.decodes[0].decodes]
    assert len(arrivals) == 4 and len(set(arrivals)) == 1
    assert before <= arrivals[0] <= time.time()


async def test_preempted_again_and_again(rig: Rig) -> None:
    codes = [worker_pb2.ERROR_CODE_PREEMPTED, worker_pb2.ERROR_CODE_DRAINING]
    rig.decodes[0].fail_after = {k: codes[k % 2] for k in range(1, 20, 3)}
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=30)))
    assert ids_of(responses) == PROMPT[:30]


async def test_an_overloaded_worker_is_left_for_another(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2, decodes=2) as rig:
        for worker in rig.workers:
            worker.refusals.append(worker_pb2.ERROR_CODE_OVERLOADED)
        responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=5)))
        assert ids_of(responses) == PROMPT[:5]
        assert all(worker.prefills for worker in rig.prefills)
        assert all(worker.decodes for worker in rig.decodes)
        assert rig.metric("restarted_sequences_total", cause="overloaded") == 4


async def test_overloaded_everywhere_ends_with_resource_exhausted(rig: Rig) -> None:
    rig.prefills[0].refusals.extend([worker_pb2.ERROR_CODE_OVERLOADED] * 50)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await collect(rig.stub.Generate(ask(PROMPT)))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailer(error.value, "retry-after") == "1"
    assert len(rig.prefills[0].prefills) == 6  # the first and max_restarts


async def test_a_sequence_goes_on_where_the_device_works(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2, decodes=2) as rig:
        for worker in (rig.prefills[0], rig.decodes[0]):
            worker.refusals.extend([worker_pb2.ERROR_CODE_DEVICE] * 50)
        for _ in range(6):
            responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=5)))
            assert ids_of(responses) == PROMPT[:5]
        assert rig.metric("restarted_sequences_total", cause="device failed") > 0
        await until(lambda: rig.idle)


async def test_a_sequence_under_which_every_device_fails_ends(tiny_model: Path) -> None:
    """It may be what breaks them: three workers are tried, also where each gains it a token."""
    async with start_rig(tiny_model, decodes=5) as rig:
        for worker in rig.decodes:
            worker.refusals.append(worker_pb2.ERROR_CODE_DEVICE)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collect(rig.stub.Generate(ask(PROMPT, max_tokens=20)))
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert sum(bool(worker.decodes) for worker in rig.decodes) == 3
        await until(lambda: rig.idle)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (worker_pb2.ERROR_CODE_INVALID, grpc.StatusCode.INVALID_ARGUMENT),
        (worker_pb2.ERROR_CODE_INTERNAL, grpc.StatusCode.INTERNAL),
        (worker_pb2.ERROR_CODE_DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_a_workers_error_ends_the_request(rig: Rig, code: int, status: Any) -> None:
    rig.decodes[0].refusals.append(code)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await collect(rig.stub.Generate(ask(PROMPT, max_tokens=5)))
    assert error.value.code() is status
    assert "decode-0" in error.value.details()
    await until(lambda: rig.idle)


async def test_a_failure_here_is_of_one_request(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: Any) -> None: ...

        def push(self, token_ids: list[int]) -> Any:
            raise RuntimeError("planted")

    rig.decodes[0].gate.clear()
    sound = rig.stub.Generate(ask(PROMPT, max_tokens=4))
    await sound.read()
    monkeypatch.setattr("crossdock.router.served.IncrementalDetokenizer", Broken)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await collect(rig.stub.Generate(ask(PROMPT)))
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert "planted" in error.value.details()
    rig.decodes[0].gate.set()
    assert ids_of(await collect(sound)) == PROMPT[1:4]
    await until(lambda: rig.prefills[0].cancels and rig.idle)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_lost_worker_is_a_longer_gap(rig: Rig, role: str) -> None:
    lost = rig.prefills[0] if role == "prefill" else rig.decodes[0]
    call = rig.stub.Generate(ask(PROMPT, max_tokens=30, logprobs=0))
    before = []
    if role == "decode":
        rig.decodes[0].step_s = 0.01
        before = [await call.read() for _ in range(4)]
    else:
        lost.gate.clear()
        await until(lambda: lost.running)
    lost.break_streams()
    lost.gate.set()
    responses = [*before, *await collect(call)]
    assert ids_of(responses) == PROMPT[:30]
    assert sum(len(response.logprobs) for response in responses) == 30
    assert responses[-1].usage.completion_tokens == 30
    assert rig.metric("restarted_sequences_total", cause="worker lost") == 1
    await until(lambda: rig.idle)


async def test_a_request_under_which_workers_keep_dying_is_refused(rig: Rig) -> None:
    rig.prefills[0].gate.clear()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=9))
    for _ in range(3):
        await until(lambda: rig.prefills[0].running)
        rig.prefills[0].break_streams()
        await until(lambda: not rig.prefills[0].running)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await collect(call)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "prefill worker prefill-0 was lost" in error.value.details()
    assert trailer(error.value, "retriable") == "true"
    rig.prefills[0].gate.set()
    assert ids_of(await collect(rig.stub.Generate(ask(PROMPT, max_tokens=3)))) == PROMPT[:3]


async def test_a_failed_pull_is_prefilled_again(rig: Rig) -> None:
    rig.decodes[0].refusals.append(worker_pb2.ERROR_CODE_PULL_FAILED)
    assert ids_of(await collect(rig.stub.Generate(ask(PROMPT, max_tokens=9)))) == PROMPT[:9]
    assert rig.metric("restarted_sequences_total", cause="pull failed") == 1


async def test_a_pair_whose_pull_failed_gets_nothing_for_a_while(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2, decodes=2) as rig:
        for decode in rig.decodes:
            decode.refusals.append(worker_pb2.ERROR_CODE_PULL_FAILED)
        assert ids_of(await collect(rig.stub.Generate(ask(PROMPT, max_tokens=9)))) == PROMPT[:9]
        now, view = time.monotonic(), rig.gateway.view
        backing_off = [
            (prefill, decode)
            for prefill in ("prefill-0", "prefill-1")
            for decode in ("decode-0", "decode-1")
            if view.pairs.backs_off(prefill, decode, now)
        ]
        assert rig.metric("restarted_sequences_total", cause="pull failed") == 2
        assert len({prefill for prefill, _ in backing_off}) == len({d for _, d in backing_off}) == 2


async def test_a_lost_prefill_worker_does_not_touch_who_has_joined(rig: Rig) -> None:
    rig.decodes[0].step_s = 0.002
    call = rig.stub.Generate(ask(PROMPT, max_tokens=30))
    for _ in range(3):
        await call.read()
    rig.prefills[0].break_streams()
    assert ids_of(await collect(call)) == PROMPT[3:30]


async def test_a_prefill_worker_lost_during_the_pull_is_for_decode_to_judge(rig: Rig) -> None:
    rig.decodes[0].gate.clear()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await call.read()
    await until(lambda: rig.decodes[0].running)
    rig.prefills[0].break_streams()
    await until(lambda: rig.metric("worker_streams_lost_total") == 1)
    rig.decodes[0].gate.set()
    assert ids_of(await collect(call)) == PROMPT[1:5]


async def test_a_lost_decode_worker_before_the_hand_off_is_replaced(tiny_model: Path) -> None:
    async with start_rig(tiny_model, decodes=2) as rig:
        rig.prefills[0].gate.clear()
        call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
        await until(lambda: rig.prefills[0].prefills)
        chosen = rig.prefills[0].prefills[0].decode_worker
        stays = next(worker for worker in rig.decodes if worker.name != chosen)
        await rig.members(rig.prefills[0], stays)
        rig.prefills[0].gate.set()
        responses = await collect(call)
        assert ids_of(responses) == PROMPT[:5]
        assert responses[-1].timings.decode_worker == stays.name
