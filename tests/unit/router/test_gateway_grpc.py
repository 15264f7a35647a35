"""The gRPC front door and the dispatcher behind it, over real gRPC, before fake workers."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_rig import (
    HASH_KEY,
    PROMPT,
    Rig,
    ask,
    collect,
    ids_of,
    refusal,
    start_rig,
    text_of,
    until,
)
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from crossdock.model.store import resolve
from crossdock.model.text import load_text
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.results import read_result
from crossdock.router.frontdoor import grpc_health
from crossdock.router.frontdoor.grpc_health import HEALTH, REFLECTION, REFLECTION_ALPHA
from crossdock.router.frontdoor.grpc_inference import SERVICE as NAME
from crossdock.router.frontdoor.grpc_kserve import KSERVE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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
    assert answer.model == rig.only.name
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
    total = sum(rig.timed("stage_seconds_sum", stage=stage) for stage in stages)
    assert total == pytest.approx(rig.timed("ttft_seconds_sum"), abs=1e-3)
    assert timings.first_token == pytest.approx(rig.timed("ttft_seconds_sum"), abs=1e-6)


async def test_timings_have_what_was_predicted_once_its_worker_has_measured(rig: Rig) -> None:
    early = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
    assert not early.completions[0].timings.HasField("predicted_ttft")
    rig.prefills[0].report(prefill_tokens_per_s=100.0, prefill_step_tokens=4096)
    worker = rig.gateway.view.workers["prefill-0"]
    await until(lambda: worker.load.prefill_tokens_per_s == 100.0)
    answer = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
    uncached = len(PROMPT) - answer.usage.cached_tokens
    predicted = read_result(answer).timings.predicted_ttft
    assert predicted == pytest.approx(uncached / 100.0, rel=0.1)


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


async def test_block_hashes_begin_with_the_layout_of_the_workers(tiny_model: Path) -> None:
    """Also of a prompt that came before any worker did, and after all have got another layout."""
    async with start_rig(tiny_model) as rig:
        (prefill, decode), seen = rig.workers, []
        await rig.gateway.update_members([])
        await until(lambda: not rig.gateway.view.workers)
        for layout in (b"the first layout", b"the second, 16 b"):
            call = collect(rig.stub.Generate(ask(PROMPT, max_tokens=2)))
            early = asyncio.create_task(call)
            await until(lambda: rig.only.dispatcher.waiting_sequences)
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


async def test_a_watcher_that_leaves_takes_no_other_with_it(rig: Rig) -> None:
    stub = health_pb2_grpc.HealthStub(rig.channel)
    one, other = (stub.Watch(health_pb2.HealthCheckRequest(service=NAME)) for _ in range(2))
    for watch in (one, other):
        assert (await watch.read()).status == SERVING
    one.cancel()
    await rig.members(rig.prefills[0])
    assert (await other.read()).status == NOT_SERVING
    other.cancel()


async def test_so_many_watch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs a credential for it, and each is kept."""
    monkeypatch.setattr(grpc_health, "MAX_WATCHES", 2)
    stub = health_pb2_grpc.HealthStub(rig.channel)
    request = health_pb2.HealthCheckRequest(service=NAME)
    watches = [stub.Watch(request) for _ in range(2)]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    with pytest.raises(grpc.aio.AioRpcError, match="2 watches are open") as refused:
        await stub.Watch(request).read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Check(request)).status == SERVING
    watches[0].cancel()
    await until(lambda: rig.gateway._grpc._health._watches == 1)
    assert (await stub.Watch(request).read()).status == SERVING
    watches[1].cancel()


async def test_health_lists_all_services(rig: Rig) -> None:
    listed = await health_pb2_grpc.HealthStub(rig.channel).List(health_pb2.HealthListRequest())
    assert set(listed.statuses) == {"", NAME, KSERVE}
    assert {each.status for each in listed.statuses.values()} == {SERVING}
    watch = health_pb2_grpc.HealthStub(rig.channel).Watch(
        health_pb2.HealthCheckRequest(service="nobody")
    )
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_the_services(rig: Rig, version: str) -> None:
    kind = reflection_pb2.ServerReflectionRequest
    call = rig.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=kind.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    names = (NAME, KSERVE, HEALTH, REFLECTION, REFLECTION_ALPHA)

    async def requests() -> AsyncIterator[Any]:
        yield kind(list_services="")
        for name in names:
            yield kind(file_containing_symbol=name)

    listed, *described = [answer async for answer in call(requests())]
    assert {each.name for each in listed.list_services_response.service} == set(names)
    for name, answer in zip(names, described, strict=True):
        pool = descriptor_pool.DescriptorPool()
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            pool.AddSerializedFile(raw)
        service = pool.FindServiceByName(name)
        for method in service.methods:
            assert method.input_type.full_name.startswith(name.rpartition(".")[0])


async def test_errors_carry_details(rig: Rig) -> None:
    error = await refusal(rig, ask(PROMPT, temperature=-1))
    status = rpc_status.from_call(error)
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(bad)
    assert (info.reason, info.domain, info.metadata["retriable"]) == (
        "InvalidRequest", "crossdock", "false"
    )  # fmt: skip
    assert bad.field_violations[0].field == "temperature"
    await rig.gateway.drain(0)
    status, retry = (
        rpc_status.from_call(await refusal(rig, ask(PROMPT))),
        error_details_pb2.RetryInfo(),
    )
    assert status.details[1].Unpack(retry) and retry.retry_delay.seconds == 1


async def test_connections_are_made_anew_when_old(tiny_model: Path) -> None:
    async with start_rig(tiny_model, max_connection_age_s=0.2) as rig:
        rig.decodes[0].gate.clear()
        call = rig.stub.Generate(ask(PROMPT, max_tokens=4))
        await call.read()
        while (state := rig.channel.get_state()) is grpc.ChannelConnectivity.READY:
            await rig.channel.wait_for_state_change(state)  # it takes no new calls
        rig.decodes[0].gate.set()
        assert ids_of(await collect(call)) == PROMPT[1:4]  # its stream goes on
        assert (
            await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=2))
        ).usage.completion_tokens == 2


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


async def test_an_address_of_another_host_is_not_called_in_use(tiny_model: Path) -> None:
    from crossdock.proto.errors import ConfigError

    for kind in ("grpc", "http"):
        address = "192.0.2.1:0"  # of documentation, and nobody's
        with pytest.raises(ConfigError, match=rf"gateway.{kind}: {address}: .*(?i:cannot assign)"):
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
