"""The gRPC front door and the dispatcher behind it, over real gRPC, before fake workers."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_worker import FakeWorker
from gateway_rig import HASH_KEY, Rig, ask, collect, ids_of, start_rig, text_of, until
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from crossdock.model.store import resolve
from crossdock.model.text import load_text
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import worker_pb2

PROMPT = list(range(10, 50))
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model) as made:
        yield made


async def refusal(rig: Rig, request: Any, **call: Any) -> grpc.aio.AioRpcError:
    """How Generate and GenerateUnary refuse a request: alike."""
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await collect(rig.stub.Generate(request, **call))
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await rig.stub.GenerateUnary(request, **call)
    assert streamed.value.code() == unary.value.code()
    assert streamed.value.details() == unary.value.details()
    return streamed.value


def trailer(error: grpc.aio.AioRpcError, name: str) -> str | None:
    return dict(error.trailing_metadata() or ()).get(name)


# -- one request -------------------------------------------------------------------------------


async def test_one_request_end_to_end(rig: Rig) -> None:
    request = ask(PROMPT, max_tokens=5, seed=9)
    request.request_id = "mine"
    responses = await collect(rig.stub.Generate(request))
    assert ids_of(responses) == PROMPT[:5]
    assert {r.request_id for r in responses} == {"mine"}
    last = responses[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (40, 5)
    assert all(not r.finish_reason and not r.HasField("usage") for r in responses[:-1])
    (prefill,), (decode,) = rig.prefills[0].prefills, rig.decodes[0].decodes
    assert prefill.decode_worker == "decode-0"
    assert list(prefill.sequence.token_ids) == PROMPT
    assert list(prefill.sequence.block_hashes) == rig.hashes(PROMPT)
    assert list(decode.sequence.token_ids) == PROMPT + PROMPT[:1]
    assert decode.sequence.prompt_tokens == 40
    assert decode.progress.ticket.prefill_worker == "prefill-0"
    assert prefill.sequence.sampling.seed == decode.sequence.sampling.seed == 9
    assert prefill.sequence.sampling.HasField("temperature")
    await until(lambda: rig.idle)


async def test_token_0_reaches_the_client_before_decode_says_anything(rig: Rig) -> None:
    rig.decodes[0].gate.clear()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=3))
    first = await call.read()
    assert list(first.token_ids) == PROMPT[:1]
    await until(lambda: rig.decodes[0].decodes)
    rig.decodes[0].gate.set()
    assert ids_of(await collect(call)) == PROMPT[1:3]


async def test_text_in_and_out(rig: Rig, tiny_model: Path) -> None:
    text = load_text(resolve(str(tiny_model)))
    said = "Grüße aus Köln, 你好 🙂 world"
    rig.prefills[0].script = rig.decodes[0].script = text.encode(said)
    count = len(text.encode(said))
    request = pb.GenerateRequest(
        text="hello", sampling=pb.SamplingParams(max_tokens=count, ignore_eos=True)
    )
    responses = await collect(rig.stub.Generate(request))
    assert text_of(responses) == text.decode(text.encode(said))
    assert "🙂" in text_of(responses)
    assert not any("\ufffd" in r.text for r in responses)
    assert list(rig.prefills[0].prefills[0].sequence.token_ids) == text.encode("hello")


async def test_chat_goes_through_the_template(rig: Rig, tiny_model: Path) -> None:
    text = load_text(resolve(str(tiny_model)))
    message = pb.ChatMessage(role="user", content="hi")
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[message]), sampling=pb.SamplingParams(max_tokens=1)
    )
    await rig.stub.GenerateUnary(request)
    expected = text.apply_chat_template([{"role": "user", "content": "hi"}])
    assert list(rig.prefills[0].prefills[0].sequence.token_ids) == expected


async def test_unary_sums_what_the_stream_says(rig: Rig) -> None:
    answer = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=4, n=3, seed=5))
    assert [list(c.token_ids) for c in answer.completions] == [PROMPT[:4]] * 3
    assert [c.index for c in answer.completions] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (40, 12)
    assert answer.model == rig.gateway._grpc._frontend.model_id
    seeds = [p.sequence.sampling.seed for p in rig.prefills[0].prefills]
    assert seeds == [5, 6, 7]


async def test_continuations_wait_for_the_first_and_find_its_prefix(rig: Rig) -> None:
    rig.prefills[0].gate.clear()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=2, n=3))
    await until(lambda: rig.prefills[0].prefills)
    assert len(rig.prefills[0].prefills) == 1
    rig.prefills[0].gate.set()
    responses = await collect(call)
    cached = {r.index: r.usage.cached_tokens for r in responses if r.finish_reason}
    assert cached == {0: 0, 1: 32, 2: 32}


async def test_a_seed_is_drawn_where_none_is_given(rig: Rig) -> None:
    for _ in range(2):
        await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
    seeds = {p.sequence.sampling.seed for p in rig.prefills[0].prefills}
    assert len(seeds) == 2


async def test_eos_ends_but_has_no_text(rig: Rig, tiny_model: Path) -> None:
    text = load_text(resolve(str(tiny_model)))
    eos = min(text.eos_token_ids)
    prompt = [*text.encode("ab"), eos, *text.encode("cd")]
    responses = await collect(rig.stub.Generate(ask(prompt, max_tokens=20)))
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert ids_of(responses) == prompt[: prompt.index(eos) + 1]
    assert text_of(responses) == "ab"


async def test_a_stop_token_ends_but_has_no_text(rig: Rig, tiny_model: Path) -> None:
    text = load_text(resolve(str(tiny_model)))
    prompt = [*text.encode("x"), *text.encode("y"), *text.encode("z")]
    request = ask(prompt, max_tokens=9, stop_token_ids=[prompt[1]])
    responses = await collect(rig.stub.Generate(request))
    assert (text_of(responses), ids_of(responses)) == ("x", prompt[:2])
    assert responses[-1].stop_reason == str(prompt[1])


async def test_a_stop_string_is_found_here_and_stops_the_worker(rig: Rig, tiny_model: Path) -> None:
    text = load_text(resolve(str(tiny_model)))
    prompt = text.encode("The capital of France is Paris. The capital of Italy is Rome.")
    rig.decodes[0].step_s = 0.005
    request = ask(prompt, max_tokens=60, stop=["is Pa", "Italy"])
    responses = await collect(rig.stub.Generate(request))
    assert text_of(responses) == "The capital of France "
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert responses[-1].stop_reason == "is Pa"
    assert responses[-1].usage.completion_tokens == len(ids_of(responses)) < len(prompt)
    await until(lambda: rig.decodes[0].cancels)
    await until(lambda: rig.idle)
    assert not rig.decodes[0].decodes[0].sequence.sampling.stop


async def test_logprobs_come_with_each_token(rig: Rig) -> None:
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=3, logprobs=2)))
    found = [entry for r in responses for entry in r.logprobs]
    assert [entry.chosen.token_id for entry in found] == PROMPT[:3]
    assert [entry.chosen.logprob for entry in found] == [-0.25, -1.25, -2.25]
    assert {len(entry.top) for entry in found} == {2}


async def test_cached_tokens_are_told(rig: Rig) -> None:
    first = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=2))
    second = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=2))
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 32)
    assert rig.metric("cached_tokens_total") == 32
    assert rig.metric("prompt_tokens_total") == 80


async def test_tenants_and_salts_do_not_share_prefixes(rig: Rig) -> None:
    for tenant, salt in (("a", ""), ("b", ""), ("a", "s"), ("a", "")):
        request = ask(PROMPT, max_tokens=1)
        request.tenant, request.cache_salt = tenant, salt
        await rig.stub.GenerateUnary(request)
    a, b, salted, again = [tuple(p.sequence.block_hashes) for p in rig.prefills[0].prefills]
    assert len({a, b, salted}) == 3
    assert a == again


async def test_timings_are_in_order_and_name_the_workers(rig: Rig) -> None:
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=4)))
    timings = responses[-1].timings
    names = [f.name for f in pb.Timings.DESCRIPTOR.fields[:13]]
    values = [getattr(timings, name) for name in names if timings.HasField(name)]
    assert len(values) == len(names)
    assert values == sorted(values)
    assert (timings.prefill_worker, timings.decode_worker) == ("prefill-0", "decode-0")
    assert (timings.transferred_blocks, timings.transferred_bytes) == (3, 3000)
    assert rig.metric("transferred_bytes_total") == 3000
    stages = ("admission", "routing", "prefill_queue", "prefill", "delivery")
    total = sum(rig.metric("stage_seconds_sum", stage=stage) for stage in stages)
    assert total == pytest.approx(rig.metric("ttft_seconds_sum"), abs=1e-3)
    assert timings.first_token == pytest.approx(rig.metric("ttft_seconds_sum"), abs=1e-6)


async def test_max_tokens_one_never_reaches_decode(rig: Rig) -> None:
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=1)))
    assert ids_of(responses) == PROMPT[:1]
    assert not rig.decodes[0].decodes


async def test_the_rest_of_the_context_by_default(rig: Rig) -> None:
    prompt = [7] * 2040  # of 2048
    answer = await rig.stub.GenerateUnary(ask(prompt, ignore_eos=True))
    assert len(answer.completions[0].token_ids) == 8


async def test_models_are_listed(rig: Rig, tiny_model: Path) -> None:
    (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.context_length) == (resolve(str(tiny_model)).model_id, 2048)


async def test_many_at_once(rig: Rig) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(10, 200) for _ in range(rng.randrange(1, 90))] for _ in range(60)]
    answers = await asyncio.gather(
        *(rig.stub.GenerateUnary(ask(p, max_tokens=9, ignore_eos=True)) for p in prompts)
    )
    for prompt, answer in zip(prompts, answers):
        assert list(answer.completions[0].token_ids) == (prompt * 9)[:9]
    await until(lambda: rig.idle)
    assert rig.metric("requests_total", outcome="ok") == 60
    assert rig.metric("active_sequences") == 0


# -- health and reflection ---------------------------------------------------------------------


async def test_health_follows_the_workers(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=1, decodes=1) as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        seen = [(await watch.read()).status]
        assert seen == [SERVING]
        await rig.members(rig.prefills[0])  # decode-0 leaves
        assert (await watch.read()).status == NOT_SERVING
        named = health_pb2.HealthCheckRequest(service="crossdock.v1.Inference")
        assert (await stub.Check(named)).status == NOT_SERVING
        await rig.members()
        assert (await watch.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()


async def test_not_serving_before_any_worker(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=0, decodes=0, colocated=0) as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        assert not rig.gateway.ready


async def test_a_colocated_worker_alone_serves(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=0, decodes=0, colocated=1) as rig:
        assert rig.gateway.ready
        responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=6)))
        assert ids_of(responses) == PROMPT[:6]
        (decode,) = rig.colocated[0].decodes
        assert not decode.HasField("progress")
        assert responses[-1].timings.transferred_blocks == 0


async def test_reflection_describes_the_service(rig: Rig) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(rig.channel)
    kind = reflection_pb2.ServerReflectionRequest

    async def requests() -> AsyncIterator[Any]:
        yield kind(list_services="")
        yield kind(file_containing_symbol="crossdock.v1.Inference")

    listed, described = [answer async for answer in stub.ServerReflectionInfo(requests())]
    names = {service.name for service in listed.list_services_response.service}
    assert {"crossdock.v1.Inference", "grpc.health.v1.Health"} <= names
    (raw,) = described.file_descriptor_response.file_descriptor_proto[:1]
    found = descriptor_pb2.FileDescriptorProto.FromString(raw)
    assert "Inference" in [service.name for service in found.service]


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
    (ask(temperature=float("nan")), "temperature", "nan"),
    (ask(temperature=float("inf")), "temperature", "inf"),
    (ask(top_p=0.0), "top_p", "(0, 1]"),
    (ask(top_p=1.5), "top_p", "1.5"),
    (ask(top_p=float("nan")), "top_p", "nan"),
    (ask(top_k=-1), "top_k", "-1"),
    (ask(min_p=2.0), "min_p", "2.0"),
    (ask(repetition_penalty=0.0), "repetition_penalty", "0.0"),
    (ask(presence_penalty=3.0), "presence_penalty", "3.0"),
    (ask(frequency_penalty=float("nan")), "frequency_penalty", "nan"),
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


@pytest.mark.parametrize("policy", ["least_latency", "round_robin"])
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
        assert "whole KV pool of a worker holds 128 tokens" in error.details()
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
    async with start_rig(tiny_model, max_active=3, max_active_per_tenant=2) as rig:
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
        rig.prefills[0].gate.set()
        await asyncio.gather(*held)
        await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=2))
        assert rig.metric("requests_total", outcome="overloaded") == 4


async def test_a_client_that_goes_away_stops_the_decode_worker(rig: Rig) -> None:
    rig.decodes[0].step_s = 0.002
    call = rig.stub.Generate(ask(PROMPT, max_tokens=500))
    for _ in range(3):
        await call.read()
    assert not rig.gateway._links.get("prefill-0").sequences, "released when decode joined"
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


async def test_block_hashes_begin_with_the_layout_of_the_workers(tiny_model: Path) -> None:
    """Also of a prompt that came before any worker did, and after all have got another layout."""
    async with start_rig(tiny_model) as rig:
        (prefill, decode), seen = rig.workers, []
        await rig.gateway.update_members([])
        await until(lambda: not rig.gateway.view.workers)
        for layout in (b"the first layout", b"the second, 16 b"):
            call = collect(rig.stub.Generate(ask(PROMPT, max_tokens=2)))
            early = asyncio.create_task(call)
            await until(lambda: rig.gateway._dispatcher.waiting_sequences)
            for worker in rig.workers:
                worker.layout_hash = layout
                await worker.restart()
            await rig.members()
            await early
            sequence = prefill.prefills[-1].sequence
            assert list(sequence.block_hashes) == rig.hashes(PROMPT)
            assert list(decode.decodes[-1].sequence.block_hashes) == rig.hashes(PROMPT)
            assert rig.gateway.view.layout_hash == layout
            seen += [sequence.root_hash, *sequence.block_hashes]
            await rig.gateway.update_members([])
            await until(lambda: not rig.gateway.view.workers)
        assert len(set(seen)) == 6


# -- workers that fail -------------------------------------------------------------------------


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
    monkeypatch.setattr("crossdock.router.gateway.IncrementalDetokenizer", Broken)
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
            if view.backs_off(prefill, decode, now)
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


# -- membership --------------------------------------------------------------------------------


async def test_without_workers_a_request_waits_a_while(tiny_model: Path) -> None:
    async with start_rig(tiny_model, decodes=0, worker_wait_s=0.15) as rig:
        error = await refusal(rig, ask(PROMPT))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no decode worker is ready (waited 0.15 s)"
        assert not rig.prefills[0].prefills


async def test_a_worker_that_appears_serves_who_waited(tiny_model: Path) -> None:
    async with start_rig(tiny_model) as rig:
        await rig.members(rig.prefills[0])
        call = rig.stub.GenerateUnary(ask(PROMPT, max_tokens=3))
        await until(lambda: rig.metric("waiting_sequences") == 1)
        await rig.members()
        assert list((await call).completions[0].token_ids) == PROMPT[:3]


async def test_who_leaves_the_membership_finishes_what_it_has(tiny_model: Path) -> None:
    async with start_rig(tiny_model, decodes=2) as rig:
        for worker in rig.decodes:
            worker.gate.clear()
        call = rig.stub.GenerateUnary(ask(PROMPT, max_tokens=20))
        await until(lambda: any(worker.running for worker in rig.decodes))
        leaver = next(worker for worker in rig.decodes if worker.running)
        stays = next(worker for worker in rig.decodes if worker is not leaver)
        await rig.members(rig.prefills[0], stays)
        stays.gate.set()
        second = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=3))
        assert second.completions[0].timings.decode_worker == stays.name
        leaver.gate.set()
        assert list((await call).completions[0].token_ids) == PROMPT[:20]
        await until(lambda: not leaver.connected)


async def test_a_draining_worker_gets_nothing_new(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2) as rig:
        rig.prefills[0].report(draining=True)
        await until(lambda: rig.gateway.view.workers["prefill-0"].load.draining)
        for _ in range(6):
            await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
        assert (len(rig.prefills[0].prefills), len(rig.prefills[1].prefills)) == (0, 6)


async def test_a_restarted_worker_is_used_once_the_membership_says_so(tiny_model: Path) -> None:
    async with start_rig(tiny_model, worker_wait_s=0.1) as rig:
        await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
        await rig.prefills[0].restart()
        await until(lambda: len(rig.prefills[0].hellos) >= 2)  # reached again, and not trusted
        error = await refusal(rig, ask(PROMPT))
        assert error.details().startswith("no prefill worker is ready")
        await rig.members()
        assert (await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))).usage.cached_tokens == 0


async def test_a_silent_worker_is_given_up(tiny_model: Path) -> None:
    from crossdock.router.dispatch.links import LinkSettings

    links = LinkSettings(silence_s=0.5, tick_s=0.05)
    async with start_rig(tiny_model, links=links) as rig:
        rig.decodes[0].silent = True
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collect(rig.stub.Generate(ask(PROMPT, max_tokens=9)))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "silent for 0.5 s" in error.value.details()


# -- prefix events -----------------------------------------------------------------------------


async def test_a_prefix_is_found_where_it_is(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2) as rig:
        prompt = [i % 97 + 5 for i in range(800)]
        for worker in rig.prefills:
            worker.load.prefill_tokens_per_s = 100.0
        first = await rig.stub.GenerateUnary(ask(prompt, max_tokens=2))
        name = first.completions[0].timings.prefill_worker
        for _ in range(4):
            answer = await rig.stub.GenerateUnary(ask(prompt, max_tokens=2))
            assert answer.completions[0].timings.prefill_worker == name
            assert answer.usage.cached_tokens == 799


async def test_a_gap_in_the_events_is_healed_by_a_snapshot(rig: Rig) -> None:
    worker, index = rig.prefills[0], rig.gateway.view.index
    slot = rig.gateway.view.workers["prefill-0"].slot
    a, b, c = ([bytes([i]) * 16] for i in range(3))
    worker.store(a)
    await until(lambda: index.blocks_of(slot) == 1)
    worker.store(b, lose=True)
    assert worker.resyncs == 0, "hello brought a snapshot"
    worker.store(c)
    await until(lambda: index.blocks_of(slot) == 3)
    assert worker.resyncs == 1
    assert rig.metric("block_resyncs") == 1
    worker.evict(b)
    await until(lambda: index.blocks_of(slot) == 2)


# -- the gateway's own end ---------------------------------------------------------------------


async def test_draining_refuses_and_waits(rig: Rig) -> None:
    rig.decodes[0].gate.clear()
    call = rig.stub.GenerateUnary(ask(PROMPT, max_tokens=4))
    await until(lambda: rig.decodes[0].running)
    assert not await rig.gateway.drain(0.05)
    error = await refusal(rig, ask(PROMPT))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    rig.decodes[0].gate.set()
    assert await rig.gateway.drain(5)
    assert (await call).usage.completion_tokens == 4


async def test_a_port_in_use_is_named(rig: Rig, tiny_model: Path) -> None:
    from crossdock.proto.errors import ConfigError

    for kind, address in (("grpc", rig.gateway.grpc_address), ("http", rig.gateway.http_address)):
        with pytest.raises(ConfigError, match=f"gateway.{kind}: {address}: .*in use"):
            async with start_rig(tiny_model, prefills=0, decodes=0, **{kind: address}):
                pass


def test_the_gateway_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, crossdock.router.gateway;"
        "print([m for m in ('torch', 'ray', 'nixl', 'crossdock.worker') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy", "magic"), ("grpc", "nowhere"), ("http", "x:99999"), ("block_size", 0)],
)
def test_settings_that_cannot_be(field: str, value: Any) -> None:
    from crossdock.proto.errors import ConfigError
    from crossdock.router.gateway import GatewayConfig

    with pytest.raises(ConfigError, match=f"gateway.{field}"):
        GatewayConfig("gateway-0", "model", HASH_KEY, **{field: value})


@pytest.mark.parametrize("mb", [300, 1024])  # 1024: the most that the YAML takes
async def test_it_serves_with_bodies_of_which_eight_are_more_than_grpc_counts(tiny_model, mb):
    async with start_rig(tiny_model, max_body_mb=mb) as rig:
        assert await rig.stub.GenerateUnary(ask(max_tokens=2))
