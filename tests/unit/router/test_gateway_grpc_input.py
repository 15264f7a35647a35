"""What the gRPC front door refuses, its bounds, deadlines and cancellations."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from fake_worker import FakeWorker
from gateway_rig import PROMPT, Rig, ask, collect, ids_of, refusal, start_rig, trailer, until

from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import worker_pb2
from crossdock.router.placement.policy import POLICIES

# -- bad input ---------------------------------------------------------------------------------


BAD = [
    (ask([]), "token_ids", "empty"),
    (pb.GenerateRequest(text=""), "text", "empty"),
    (pb.GenerateRequest(), "input", "one of"),
    (pb.GenerateRequest(chat=pb.Chat()), "messages", "at least one"),
    (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="king", content="x")])),
        "messages[0].role",
        "'king'",
    ),
    (ask([10**6]), "token_ids", "1000000"),
    (ask([-1]), "token_ids", "-1"),
    (ask([5] * 2048), "token_ids", "2047"),
    (pb.GenerateRequest(text="a" * 1_000_000), "text", "2047"),
    (ask(temperature=-0.5), "temperature", "-0.5"),
    (ask(temperature=float("nan")), "temperature", "NaN"),
    (ask(temperature=float("inf")), "temperature", "Infinity"),
    (ask(top_p=0.0), "top_p", "(0, 1]"),
    (ask(top_p=1.5), "top_p", "1.5"),
    (ask(top_p=float("nan")), "top_p", "NaN"),
    (ask(top_k=-1), "top_k", "-1"),
    (ask(min_p=2.0), "min_p", "2.0"),
    (ask(repetition_penalty=0.0), "repetition_penalty", "0.0"),
    (ask(presence_penalty=3.0), "presence_penalty", "3.0"),
    (ask(frequency_penalty=float("nan")), "frequency_penalty", "NaN"),
    (ask(n=-1), "n", "-1"),
    (ask(n=17), "n", "16"),
    (ask(max_tokens=0), "max_tokens", "at least 1"),
    (ask(max_tokens=-4), "max_tokens", "-4"),
    (ask(max_tokens=2**31 - 2), "max_tokens", "2048"),
    (ask(PROMPT, max_tokens=2009), "max_tokens", "2008"),
    (ask(min_tokens=9, max_tokens=3), "min_tokens", "9"),
    (ask(logprobs=21), "logprobs", "20"),
    (ask(stop=[str(i) for i in range(1000)]), "stop", "1000 strings"),
    (ask(stop=[""]), "stop", "1 to 256"),
    (ask(stop=["x" * 300]), "stop", "each must have 1 to 256"),
    (ask(stop_token_ids=[10**6]), "stop_token_ids", "1000000"),
    (ask(logit_bias={10**6: 1.0}), "logit_bias", "1000000"),
    (ask(logit_bias={3: 200.0}), "logit_bias[3]", "200.0"),
    (pb.GenerateRequest(text="x", tenant="t" * 300), "tenant", "256"),
]


@pytest.mark.parametrize(("request_", "field", "says"), BAD, ids=[f"{f}-{s}" for _, f, s in BAD])
async def test_bad_input_is_refused_by_name(
    rig: Rig, request_: pb.GenerateRequest, field: str, says: str
) -> None:
    error = await refusal(rig, request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}:")
    assert says in error.details()
    assert trailer(error, "error-field") == field
    assert not rig.prefills[0].prefills, "nothing may start"
    assert ids_of(await collect(rig.stub.Generate(ask(PROMPT, max_tokens=2)))) == PROMPT[:2]
    assert rig.metric("requests_total", outcome="invalid") == 2


@pytest.mark.parametrize("policy", POLICIES)
async def test_pools_of_unlike_sizes_serve_in_full_what_they_take(
    tiny_model: Path, policy: str
) -> None:
    async with (
        start_rig(tiny_model, num_blocks=8, policy=policy, worker_wait_s=0.3) as rig,
        FakeWorker("prefill-1", Role.PREFILL, num_blocks=20) as prefill,
        FakeWorker("decode-1", Role.DECODE, num_blocks=20) as decode,
    ):
        rig.prefills.append(prefill)
        rig.decodes.append(decode)
        await rig.members()
        for tokens in (150, 127, 126, 60):  # 128 fit the small ones
            for _ in range(4):
                answer = await rig.stub.GenerateUnary(ask([5] * tokens, max_tokens=100))
                assert answer.usage.completion_tokens == 100
        decode.fail_after = {70: worker_pb2.ERROR_CODE_PREEMPTED}
        answer = await rig.stub.GenerateUnary(ask([5] * 60, max_tokens=100))
        assert answer.usage.completion_tokens == 100
        assert len(prefill.prefills[-1].sequence.token_ids) == 130, "the small one cannot go on"
        await rig.members(*rig.prefills, rig.decodes[0])
        await until(lambda: "decode-1" not in rig.gateway.view.workers)
        error = await refusal(rig, ask([5] * 60, max_tokens=100))
        assert error.code() is grpc.StatusCode.UNAVAILABLE, "who is replaced is waited for"
        assert "no decode worker that holds 160 tokens is ready" in error.details()


async def test_a_prompt_longer_than_the_whole_pool(tiny_model: Path) -> None:
    async with start_rig(tiny_model, num_blocks=8) as rig:
        error = await refusal(rig, ask([5] * 128))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "128 tokens" in error.details()
        assert "a worker holds at most 128 tokens of a sequence" in error.details()
        error = await refusal(rig, ask([5] * 100, max_tokens=29))
        assert "at most 28 tokens fit" in error.details()
        answer = await rig.stub.GenerateUnary(ask([5] * 100, max_tokens=28))
        assert answer.usage.completion_tokens == 28


async def test_an_unknown_model(rig: Rig) -> None:
    error = await refusal(rig, pb.GenerateRequest(text="x", model="gpt-9"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'gpt-9'" in error.details()


async def raw_error(rig: Rig, body: bytes) -> grpc.aio.AioRpcError:
    method = rig.channel.unary_unary("/crossdock.v1.Inference/GenerateUnary")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await method(body)
    return error.value


async def test_a_message_that_is_none(rig: Rig) -> None:
    error = await raw_error(rig, b"\x1a\xff\xff\xff\xff\x0fxx")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("message:")


async def test_invalid_utf8(rig: Rig) -> None:
    error = await raw_error(rig, b"\x1a\x03a\xff\xfe")  # field 3, text
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in error.details()


async def test_a_50_mb_message(rig: Rig) -> None:
    body = pb.GenerateRequest(text="a" * 50_000_000).SerializeToString()
    error = await raw_error(rig, body)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 8000000 bytes" in error.details()
    assert (await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))).usage.completion_tokens == 1


# -- limits, deadlines, cancellation -----------------------------------------------------------


async def test_more_than_the_bound_is_refused_with_retry_after(tiny_model: Path) -> None:
    async with start_rig(
        tiny_model, max_active=3, max_active_per_tenant=2, max_request_share=1
    ) as rig:
        rig.prefills[0].gate.clear()
        held = [rig.stub.GenerateUnary(ask(PROMPT, max_tokens=2)) for _ in range(2)]
        await until(lambda: len(rig.prefills[0].prefills) == 2)
        error = await refusal(rig, ask(PROMPT))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_active_per_tenant = 2" in error.details()
        assert int(trailer(error, "retry-after") or 0) >= 1
        assert trailer(error, "retriable") == "true"
        other = ask(PROMPT, n=2)
        other.tenant = "other"
        assert "max_active = 3" in (await refusal(rig, other)).details()
        error = await refusal(rig, ask(PROMPT, n=3))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (trailer(error, "error-field"), trailer(error, "retriable")) == ("n", "false")
        rig.prefills[0].gate.set()
        await asyncio.gather(*held)
        await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=2))
        assert rig.metric("requests_total", outcome="overloaded") == 4


async def test_a_client_that_goes_away_stops_the_decode_worker(rig: Rig) -> None:
    rig.decodes[0].step_s = 0.002
    call = rig.stub.Generate(ask(PROMPT, max_tokens=500))
    for _ in range(3):
        await call.read()
    assert not rig.only.links.get("prefill-0").sequences, "released when decode joined"
    call.cancel()
    await until(lambda: rig.decodes[0].cancels)
    await until(lambda: rig.idle)
    assert rig.metric("requests_total", outcome="cancelled") == 1
    assert rig.metric("active_sequences") == 0


async def test_a_client_that_goes_away_stops_the_prefill_worker(rig: Rig) -> None:
    rig.prefills[0].gate.clear()
    call = rig.stub.GenerateUnary(ask(PROMPT, n=2))
    await until(lambda: rig.prefills[0].running)
    call.cancel()
    await until(lambda: rig.prefills[0].cancels)
    await until(lambda: rig.idle)
    assert not rig.decodes[0].decodes


async def test_a_cancel_between_token_0_and_1_reaches_both_workers(rig: Rig) -> None:
    rig.decodes[0].gate.clear()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=9))
    await call.read()
    await until(lambda: rig.decodes[0].running)
    call.cancel()
    await until(lambda: rig.decodes[0].cancels and rig.prefills[0].cancels)
    await until(lambda: rig.idle)


async def test_a_deadline_frees_everything(rig: Rig) -> None:
    rig.decodes[0].gate.clear()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await collect(rig.stub.Generate(ask(PROMPT, max_tokens=9), timeout=0.2))
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert rig.prefills[0].prefills[0].sequence.deadline_unix_ms > 0
    await until(lambda: rig.decodes[0].cancels and rig.idle)


async def test_a_request_without_a_deadline_gets_the_gateways(tiny_model: Path) -> None:
    async with start_rig(tiny_model, request_timeout_s=0.2) as rig:
        rig.decodes[0].gate.clear()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collect(rig.stub.Generate(ask(PROMPT, max_tokens=9)))
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the deadline of 0.20 s passed at 1 tokens" in error.value.details()
        assert rig.metric("requests_total", outcome="deadline") == 1


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(rig: Rig) -> None:
    rig.prefills[0].report(queued_tokens=100_000, prefill_tokens_per_s=100.0)
    view = rig.gateway.view.workers["prefill-0"]
    await until(lambda: view.queued_tokens == 100_000)
    error = await refusal(rig, ask(PROMPT), timeout=5)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "predicted in 1000.40 s" in error.details()
    assert trailer(error, "retry-after") == "60"
    assert not rig.prefills[0].prefills
