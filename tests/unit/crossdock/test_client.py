from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import MODEL, FakeServer

from crossdock import AsyncClient, Client, SamplingParams
from crossdock.client import build_request
from crossdock.proto import errors
from crossdock.proto.types import FinishReason, Grammar, GrammarKind
from crossdock.results import ToolCall


@pytest.fixture
def gateway() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(gateway: FakeServer) -> Iterator[Client]:
    with Client(gateway.target) as made:
        yield made


def test_generate_returns_text_tokens_usage_and_timings(client: Client) -> None:
    result = client.generate("three small words", max_tokens=2, temperature=0, logprobs=1)
    assert result.text == " 0 1"
    assert result.token_ids == (100, 101)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 2)
    assert [each.logprob for each in result.logprobs] == [-0.5, -0.5]
    assert result.logprobs[0].top == ((100, -0.5),)
    assert result.timings is not None
    assert result.timings.ttft == 0.25
    assert "joined" not in result.timings.events
    assert result.model == MODEL


def test_continuations_come_in_the_order_of_their_index(client: Client) -> None:
    result = client.generate("x", n=3)
    assert [each.index for each in result.completions] == [0, 1, 2]


def test_stream_yields_chunks_and_ends_with_the_usage(client: Client) -> None:
    chunks = list(client.stream([5, 6, 7, 8], max_tokens=3))
    assert "".join(chunk.text for chunk in chunks) == " 0 1 2"
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, FinishReason.LENGTH]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 4
    assert chunks[-1].timings is not None
    assert chunks[-1].timings.prefill_worker == "prefill-0"


def test_only_what_was_given_is_sent(client: Client, gateway: FakeServer) -> None:
    client.generate("x", temperature=0.0)
    sampling = gateway.requests[0].sampling
    assert sampling.HasField("temperature")
    assert not any(sampling.HasField(name) for name in ("seed", "max_tokens", "top_p", "logprobs"))
    assert gateway.deadlines[0] is None


def test_the_timeout_is_the_deadline_of_the_call(client: Client, gateway: FakeServer) -> None:
    client.generate("x", timeout=50.0)
    assert gateway.deadlines[0] is not None
    assert 40.0 < gateway.deadlines[0] < 51.0
    with pytest.raises(errors.DeadlineExceeded):
        list(client.stream("hang", timeout=0.2))


def test_closing_the_iterator_cancels_the_request(client: Client, gateway: FakeServer) -> None:
    chunks = client.stream("hang")
    assert next(chunks).token_ids == (100,)
    chunks.close()  # type: ignore[attr-defined]
    assert gateway.cancelled.wait(10)


async def test_async_client_generates_streams_and_cancels(gateway: FakeServer) -> None:
    async with AsyncClient(gateway.target) as client:
        assert (await client.generate("x", max_tokens=2)).token_ids == (100, 101)
        assert [c.text async for c in client.stream("x", max_tokens=2)] == [" 0", " 1", ""]
        assert await client.health()
        assert [m.id for m in await client.models()] == [MODEL]
        chunks = client.stream("hang")
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(gateway.cancelled.wait, 10)
        with pytest.raises(errors.NotFound, match="scripted"):
            await client.generate("abort NOT_FOUND")


async def test_cancelling_the_reading_task_cancels_the_request(gateway: FakeServer) -> None:
    async with AsyncClient(gateway.target) as client:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("hang"):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gateway.cancelled.wait, 10)


@pytest.mark.parametrize(
    ("status", "kind", "retriable"),
    [
        ("UNAVAILABLE", errors.Unavailable, True),
        ("RESOURCE_EXHAUSTED", errors.Overloaded, True),
        ("INVALID_ARGUMENT", errors.InvalidRequest, False),
        ("NOT_FOUND", errors.NotFound, False),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded, False),
        ("CANCELLED", errors.Cancelled, False),
        ("FAILED_PRECONDITION", errors.ModelError, False),
        ("INTERNAL", errors.CrossdockError, False),
        ("UNAVAILABLE:WorkerLost", errors.WorkerLost, True),
        ("UNAVAILABLE:TransferFailed", errors.TransferFailed, True),
        ("FAILED_PRECONDITION:LayoutMismatch", errors.LayoutMismatch, False),
        ("INVALID_ARGUMENT:RequestTooLarge", errors.RequestTooLarge, False),
        ("UNAVAILABLE:NotFound", errors.Unavailable, True),  # a name against its status
        ("UNAVAILABLE:OfTheFuture", errors.Unavailable, True),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_status_becomes_its_error(
    client: Client, status: str, kind: type[errors.CrossdockError], retriable: bool, streamed: bool
) -> None:
    with pytest.raises(errors.CrossdockError) as raised:
        if streamed:
            list(client.stream(f"abort {status}"))
        else:
            client.generate(f"abort {status}")
    assert type(raised.value) is kind
    assert raised.value.retriable is retriable
    assert "scripted" in str(raised.value)
    if isinstance(raised.value, errors.Overloaded):
        assert raised.value.retry_after_s == 7.0


def test_an_invalid_request_keeps_its_field_and_limit(client: Client) -> None:
    words = str(errors.InvalidRequest("top_p", 3.0, "must be in (0, 1]"))
    with pytest.raises(errors.InvalidRequest) as raised:
        client.generate(f"abort INVALID_ARGUMENT {words}")
    assert (raised.value.field, raised.value.limit) == ("top_p", "must be in (0, 1]")
    assert str(raised.value) == words


def test_no_gateway_is_unavailable_and_retriable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable) as raised:
        client.health(timeout=10)
    assert raised.value.retriable


def test_health_tells_a_gateway_that_cannot_serve(client: Client, gateway: FakeServer) -> None:
    assert client.health()
    gateway.serving = False
    assert not client.health()


def test_inputs_are_told_apart() -> None:
    assert build_request("hello").text == "hello"
    assert list(build_request([1, 2]).token_ids.ids) == [1, 2]
    assert build_request([{"role": "user", "content": "hi"}]).chat.messages[0].content == "hi"
    assert build_request(messages=[{"role": "user", "content": "hi"}]).WhichOneof("input") == "chat"
    assert build_request(token_ids=[]).WhichOneof("input") == "token_ids"
    assert build_request("").WhichOneof("input") == "text"


def test_sampling_params_set_every_field_and_keywords_win() -> None:
    request = build_request("x", sampling=SamplingParams(temperature=0.5, seed=9), seed=3)
    assert request.sampling.temperature == 0.5
    assert request.sampling.seed == 3
    assert request.sampling.max_tokens == SamplingParams().max_tokens


def test_a_negative_seed_is_sent_as_its_64_bits() -> None:
    assert build_request("x", seed=-2).sampling.seed == 2**64 - 2
    assert build_request("x", sampling=SamplingParams(seed=-2)).sampling.seed == 2**64 - 2


def test_lists_and_maps_replace_those_of_the_sampling_params() -> None:
    base = SamplingParams(stop=("a",), logit_bias={1: 2.0})
    request = build_request("x", sampling=base, stop="b", logit_bias={5: -1.0})
    assert list(request.sampling.stop) == ["b"]
    assert dict(request.sampling.logit_bias) == {5: -1.0}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"token_ids": [1, -(2**40)]}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "seed": -(2**63) - 1}, "seed"),
        ({"prompt": "\ud800"}, "text"),
    ],
)
def test_what_no_request_can_carry_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        build_request(**fields)
    assert raised.value.field == named


def test_a_wrong_call_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        build_request("x", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="exactly one"):
        build_request()
    with pytest.raises(TypeError, match="exactly one"):
        build_request("x", token_ids=[1])


@pytest.mark.parametrize("target", ["nowhere", "http://127.0.0.1:8000", "host:port", ""])
def test_a_wrong_target_is_named(target: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="host:port"):
        Client(target)


def test_one_client_serves_many_threads(client: Client) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(client.generate("x", max_tokens=2).text))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [" 0 1"] * 8


def test_importing_the_package_and_the_client_is_light() -> None:
    script = (
        "import sys, crossdock; assert 'grpc' not in sys.modules;"
        "crossdock.Client, crossdock.SamplingParams;"
        "assert not {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_chat_with_tools_is_written_as_openai_s_clients_write_it() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = ToolCall("c1", "f", '{"a": 1}')
    plain = {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call, plain]},
        {"role": "tool", "tool_call_id": "c1", "content": "y"},
    ]
    named = {"type": "function", "function": {"name": "f"}}
    chat = build_request(
        messages,
        tools=[tool],
        tool_choice=named,
        parallel_tool_calls=False,
        template_kwargs={"a": True},
        continue_final_message=False,
        grammar=Grammar(GrammarKind.REGEX, "a+"),
    ).chat
    assert [c.id for c in chat.messages[1].tool_calls] == ["c1", "c2"]
    assert (chat.tools[0].name, chat.tools[0].HasField("strict")) == ("f", False)
    assert json.loads(chat.tools[0].parameters) == {"type": "object"}
    assert chat.tool_choice.name == "f" and chat.HasField("parallel_tool_calls")
    assert json.loads(chat.template_kwargs) == {"a": True}
    assert build_request(messages, tool_choice="required").chat.tool_choice.mode == 2
    for wrong in ({"tools": [{"type": "web"}]}, {"tool_choice": "always"}, {"tools": 3}):
        with pytest.raises(errors.InvalidRequest, match=next(iter(wrong))):
            build_request(messages, **wrong)
    with pytest.raises(TypeError, match="tools"):
        build_request("text", tools=[tool])
