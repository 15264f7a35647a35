"""The OpenAI HTTP front door over real sockets: the unmodified `openai` package, and raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from gateway_rig import Rig, start_rig, until

from crossdock.model.store import resolve
from crossdock.model.text import load_text
from crossdock.proto.v1 import worker_pb2
from crossdock.router.frontdoor import http_limits

SAID = "The capital of France is Paris."


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model) as made:
        yield made


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def text(tiny_model: Path) -> Any:
    return load_text(resolve(str(tiny_model)))


@pytest.fixture
def model(tiny_model: Path) -> str:
    return resolve(str(tiny_model)).model_id


def say(rig: Rig, text: Any, said: str) -> int:
    """Lets the workers say this; the number of its tokens."""
    for worker in rig.workers:
        worker.script = text.encode(said)
    return len(text.encode(said))


async def post(rig: Rig, path: str, body: Any, **request: Any) -> tuple[int, Any, Any]:
    """Status, headers and decoded body of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{rig.url}{path}", data=data, **request) as response,
    ):
        return response.status, response.headers, await response.json()


async def events(rig: Rig, path: str, body: Any) -> list[str]:
    """The data lines of a streamed answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{rig.url}{path}", json=body) as response,
    ):
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        raw = (await response.read()).decode()
    assert raw.endswith("\n\n")
    lines = raw.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def hello(**extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}]} | extra


# -- the openai package ------------------------------------------------------------------------


async def test_chat(rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str) -> None:
    count = say(rig, text, SAID)
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=count, temperature=0
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", SAID)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    prompt = text.apply_chat_template([{"role": "user", "content": "hi"}])
    assert list(rig.prefills[0].prefills[0].sequence.token_ids) == prompt
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == count
    assert answer.usage.total_tokens == len(prompt) + count
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert (answer.object, answer.model) == ("chat.completion", model)


async def test_chat_streamed(rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str) -> None:
    said = "Grüße 🙂 Paris"
    count = say(rig, text, said)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=count,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    *content, last = chunks
    assert content[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in content) == said
    assert [c.choices[0].finish_reason for c in content][-1] == "length"
    assert all(c.usage is None for c in content)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == count
    assert {c.id for c in chunks} == {content[0].id}
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


async def test_the_blocking_client(rig: Rig, text: Any, model: str) -> None:
    count = say(rig, text, SAID)

    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="none") as client:
            whole = client.completions.create(model=model, prompt="x", max_tokens=count)
            streamed = client.completions.create(
                model=model, prompt="x", max_tokens=count, stream=True
            )
            return whole.choices[0].text, "".join(c.choices[0].text for c in streamed)

    assert await asyncio.to_thread(talk) == (SAID, SAID)


async def test_chat_logprobs(rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str) -> None:
    say(rig, text, SAID)
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = await client.chat.completions.create(**request)
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert [entry.logprob for entry in found.content] == [-0.25, -1.25, -2.25]
    assert "".join(entry.token for entry in found.content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in found.content)
    assert bytes(found.content[0].bytes or []).decode() == found.content[0].token
    streamed = [c async for c in await client.chat.completions.create(**request, stream=True)]
    pieces = [e for c in streamed for e in (c.choices[0].logprobs.content or [])]  # type: ignore[union-attr]
    assert [entry.logprob for entry in pieces] == [-0.25, -1.25, -2.25]


async def test_completion_logprobs(
    rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str
) -> None:
    say(rig, text, SAID)
    answer = await client.completions.create(model=model, prompt="x", max_tokens=3, logprobs=1)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == [-0.25, -1.25, -2.25]
    assert found.tokens is not None and found.text_offset is not None
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [0, len(found.tokens[0]), len(found.tokens[0] + found.tokens[1])]
    assert [list(top.values()) for top in found.top_logprobs or []] == [[-0.25], [-1.25], [-2.25]]


async def test_negative_seeds_are_taken_as_openai_does(
    rig: Rig, client: openai.AsyncOpenAI, model: str
) -> None:
    for seed in (-1, -(2**63)):
        await client.completions.create(model=model, prompt="x y", max_tokens=2, seed=seed)
        assert rig.prefills[0].prefills[-1].sequence.sampling.seed == 2**64 + seed


async def test_n_and_seed(rig: Rig, client: openai.AsyncOpenAI, model: str) -> None:
    answer = await client.completions.create(
        model=model, prompt="x y z", max_tokens=2, n=3, seed=40
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    seeds = [p.sequence.sampling.seed for p in rig.prefills[0].prefills]
    assert seeds == [40, 41, 42]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(rig.prefills[0].prefills[0].sequence.token_ids)


async def test_prompts_as_lists(
    rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str
) -> None:
    one, two = text.encode("The capital"), text.encode("of Italy is")
    for prompt in (["The capital", "of Italy is"], [one, two]):
        answer = await client.completions.create(model=model, prompt=prompt, max_tokens=1, n=2)
        firsts = [text.decode([ids[0]]) for ids in (one, one, two, two)]
        assert [choice.text for choice in answer.choices] == firsts
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(one) + len(two)
    answer = await client.completions.create(model=model, prompt=one, max_tokens=len(one))
    assert answer.choices[0].text == "The capital"


async def test_streams_of_several_prompts_are_told_apart(
    rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str
) -> None:
    prompts = ["The capital of", "Prefill workers are"]
    texts = ["", ""]
    reasons = {}
    async for chunk in await client.completions.create(
        model=model, prompt=prompts, max_tokens=50, stream=True, extra_body={"ignore_eos": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    for prompt, found in zip(prompts, texts):
        assert found.startswith(prompt + prompt[:1])
    assert reasons == {0: "length", 1: "length"}


async def test_16_tokens_by_default_or_what_fits(rig: Rig) -> None:
    for size, expected in ((5, 16), (2043, 5)):
        body = {"prompt": [7] * size, "ignore_eos": True}
        _, _, answer = await post(rig, "/v1/completions", body)
        assert answer["usage"]["completion_tokens"] == expected


@pytest.mark.parametrize("stop", ["is Pa", ["zzz", "is Pa"]])
async def test_stop(rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str, stop: Any) -> None:
    say(rig, text, SAID)
    answer = await client.completions.create(model=model, prompt="x", max_tokens=40, stop=stop)
    assert answer.choices[0].text == "The capital of France "
    assert answer.choices[0].finish_reason == "stop"


async def test_echo(rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str) -> None:
    say(rig, text, SAID)
    for stream in (False, True):
        answer = await client.completions.create(
            model=model, prompt="Say: ", max_tokens=1, echo=True, stream=stream
        )
        if stream:
            got = "".join([chunk.choices[0].text async for chunk in answer])
        else:
            got = answer.choices[0].text
        assert got == "Say: " + text.decode(text.encode(SAID)[:1])


async def test_the_sampling_fields_arrive(rig: Rig, client: openai.AsyncOpenAI, model: str) -> None:
    await client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"7": 3.0},
        seed=11,
        max_tokens=2,
        extra_body={
            "top_k": 5,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 1,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "something_else": [1, 2],
        },
    )
    sampling = rig.prefills[0].prefills[0].sequence.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert (dict(sampling.logit_bias), sampling.seed) == ({7: 3.0}, 11)
    assert (sampling.max_tokens, sampling.min_tokens) == (2, 1)
    assert (list(sampling.stop_token_ids), sampling.ignore_eos) == ([3], True)
    assert not sampling.HasField("logprobs")


async def test_content_parts_are_joined(rig: Rig, text: Any) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert (await post(rig, "/v1/chat/completions", body))[0] == 200
    assert (await post(rig, "/v1/chat/completions", hello(max_tokens=1)))[0] == 200
    joined, plain = [list(p.sequence.token_ids) for p in rig.prefills[0].prefills]
    assert joined == plain


async def test_models(rig: Rig, client: openai.AsyncOpenAI, model: str) -> None:
    listed = await client.models.list()
    assert [card.id for card in listed.data] == [model]
    assert (await client.models.retrieve(model)).owned_by == "crossdock"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nothing/such")


async def test_cached_tokens(rig: Rig, client: openai.AsyncOpenAI, model: str) -> None:
    for cached in (0, 32):
        answer = await client.completions.create(
            model=model, prompt=list(range(10, 50)), max_tokens=1
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


async def test_the_openai_package_sees_its_own_errors(
    rig: Rig, client: openai.AsyncOpenAI, model: str
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model=model, prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    rig.decodes[0].refusals.append(worker_pb2.ERROR_CODE_INTERNAL)
    with pytest.raises(openai.APIError, match="decode-0"):
        async for _ in await client.completions.create(model=model, prompt="x y z", stream=True):
            pass


# -- raw HTTP ----------------------------------------------------------------------------------


async def test_events_as_bytes(rig: Rig, text: Any, model: str) -> None:
    count = say(rig, text, 'a "b"\n')
    *chunks, done = await events(
        rig, "/v1/chat/completions", hello(stream=True, max_tokens=count, model=model)
    )
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert all("usage" not in chunk for chunk in parsed)
    assert parsed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in parsed[1:])
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in parsed) == 'a "b"\n'


async def test_the_request_id_is_echoed(rig: Rig) -> None:
    status, _, answer = await post(
        rig, "/v1/completions", {"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "r-7"}
    )
    assert (status, answer["id"]) == (200, "cmpl-r-7")


async def test_health(rig: Rig, tiny_model: Path) -> None:
    async with aiohttp.ClientSession() as session:
        assert (await session.get(f"{rig.url}/health")).status == 200
        await rig.members(rig.prefills[0])
        response = await session.get(f"{rig.url}/health")
        assert response.status == 503
        assert "no worker" in (await response.json())["status"]


async def test_metrics(rig: Rig) -> None:
    await post(rig, "/v1/completions", {"prompt": "x y", "max_tokens": 3, "ignore_eos": True})
    async with aiohttp.ClientSession() as session:
        exposition = await (await session.get(f"{rig.url}/metrics")).text()
    for line in (
        'crossdock_requests_total{outcome="ok"} 1.0',
        "crossdock_ttft_seconds_count 1.0",
        "crossdock_itl_seconds_count 2.0",
        "crossdock_generated_tokens_total 3.0",
        'crossdock_workers{role="decode"} 1.0',
        "crossdock_active_sequences 0.0",
    ):
        assert line in exposition, line


def chat(**extra: Any) -> tuple[str, Any]:
    return "/v1/chat/completions", hello(**extra)


def complete(**extra: Any) -> tuple[str, Any]:
    return "/v1/completions", {"prompt": "x"} | extra


LONG = "word " * 2500
BAD = [
    (complete(prompt=""), "prompt", "empty"),
    (complete(prompt=[]), "prompt", "empty"),
    (complete(prompt=None), "prompt", "required"),
    (complete(prompt=[[]]), "prompt", "empty"),
    (complete(prompt=["a", ""]), "prompt[1]", "empty"),
    (complete(prompt={"a": 1}), "prompt", "must be a string"),
    (complete(prompt=["a", 1.5]), "prompt[1]", "1.5"),
    (complete(prompt=["x"] * 65), "prompt", "65 prompts"),
    (complete(prompt=[10**6]), "prompt", "1000000"),
    (complete(prompt=[[1], [-3]]), "prompt[1]", "-3"),
    (complete(prompt=LONG), "prompt", "2047 tokens"),
    (complete(prompt="\ud800"), "prompt", "U+D800"),
    (complete(max_tokens=0), "max_tokens", "at least 1"),
    (complete(max_tokens=5000), "max_tokens", "2048"),
    (complete(prompt=[5] * 2000, max_tokens=49), "max_tokens", "at most 48"),
    (complete(max_tokens="5"), "max_tokens", "'5'"),
    (complete(n=0), "n", "from 1 to 16"),
    (complete(n=17), "n", "17"),
    (complete(temperature=float("nan")), "temperature", "nan"),
    (complete(temperature=-1), "temperature", "-1"),
    (complete(temperature="hot"), "temperature", "'hot'"),
    (complete(top_p=0), "top_p", "(0, 1]"),
    (complete(top_p=1.01), "top_p", "1.01"),
    (complete(top_k=-2), "top_k", "-2"),
    (complete(stop=[str(i) for i in range(1000)]), "stop", "1000 strings"),
    (complete(stop=[1]), "stop[0]", "1"),
    (complete(stop="\udfff"), "stop", "U+DFFF"),
    (complete(logprobs=21), "logprobs", "20"),
    (complete(logit_bias={"x": 1}), "logit_bias", "token ids"),
    (complete(logit_bias={"5": 101}), "logit_bias[5]", "100"),
    (complete(seed=-(2**63) - 1), "seed", "-9223372036854775809"),
    (complete(seed=10**400), "seed", "must be from -9223372036854775808"),
    (complete(seed=2**64), "seed", "18446744073709551616"),
    (complete(stop_token_ids=[10**6]), "stop_token_ids", "1000000"),
    (complete(suffix="end"), "suffix", "not supported"),
    (complete(best_of=3), "best_of", "not supported"),
    (complete(echo=True, logprobs=1), "echo", "logprobs"),
    (chat(messages=[]), "messages", "at least one"),
    (chat(messages="hi"), "messages", "array"),
    (chat(messages=[{"content": "x"}]), "messages[0].role", "required"),
    (chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role", "'king'"),
    (chat(messages=[{"role": "user", "content": ""}]), "messages", "empty"),
    (chat(messages=[{"role": "user", "content": LONG}]), "messages", "2047"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0].type",
        "image_url",
    ),
    (chat(priority=2**40), "priority", "1099511627776"),
    (chat(top_logprobs=3), "top_logprobs", "needs logprobs"),
    (chat(logprobs=True, top_logprobs=40), "logprobs", "40"),
    (chat(tools=[{"type": "function"}]), "tools", "not supported"),
    (chat(response_format={"type": "json_object"}), "response_format", "not supported"),
    (chat(max_completion_tokens=-1), "max_tokens", "-1"),
]


@pytest.mark.parametrize(("call", "field", "says"), BAD, ids=[f"{f}-{s}" for _, f, s in BAD])
async def test_bad_input_is_refused_by_name(
    rig: Rig, call: tuple[str, Any], field: str, says: str
) -> None:
    status, _, answer = await post(rig, *call)
    assert status == 400
    error = answer["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_request"
    assert error["message"].startswith(f"{field}:")
    assert says in error["message"]
    assert not rig.prefills[0].prefills, "nothing may start"
    assert (await post(rig, *complete(max_tokens=1)))[0] == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "valid JSON"),
        (b'{"prompt": "x"', "line 1 column"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b"[1, 2]", "JSON object"),
        (b"[" * 100_000, "plain JSON"),
        (b'{"max_tokens": ' + b"9" * 10_000 + b"}", "plain JSON"),
    ],
)
async def test_a_body_that_cannot_be_read(rig: Rig, body: bytes, says: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, answer = await post(rig, path, body)
        assert status == 400
        assert answer["error"]["param"] == "body"
        assert says in answer["error"]["message"]


async def test_harmless_values_of_unsupported_fields_pass(rig: Rig) -> None:
    body = hello(
        max_tokens=1, tools=[], tool_choice="none", response_format={"type": "text"}, user="me",
        parallel_tool_calls=True, store=False, logit_bias=None, stop=None, n=None,
    )  # fmt: skip
    assert (await post(rig, "/v1/chat/completions", body))[0] == 200
    assert (await post(rig, *complete(max_tokens=1, best_of=1, suffix=None)))[0] == 200


async def test_a_50_mb_body(rig: Rig) -> None:
    status, _, answer = await post(rig, "/v1/completions", b"x" * 50_000_000)
    assert status == 413
    assert "at most 8000000 bytes" in answer["error"]["message"]
    assert answer["error"]["param"] == "body"

    async def chunks() -> AsyncIterator[bytes]:  # no Content-Length to refuse it by
        for _ in range(50):
            yield b"x" * 1_000_000

    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{rig.url}/v1/completions", data=chunks())
        assert response.status == 413
    assert (await post(rig, *complete(max_tokens=1)))[0] == 200


async def test_a_compressed_body_is_inflated_to_the_limit_and_off_the_loop(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, threads = [0], set()
    real = zlib.decompressobj

    class Counting:
        def __init__(self, *options: Any, **named: Any) -> None:
            self._inner = real(*options, **named)

        def decompress(self, data: bytes, max_length: int = 0) -> bytes:
            threads.add(threading.get_ident())
            part = self._inner.decompress(data, max_length)
            made[0] += len(part)
            return part

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    bomb = gzip.compress(bytes(100_000_000))
    assert len(bomb) < 200_000
    gzipped = {"Content-Encoding": "gzip"}
    status, _, answer = await post(rig, "/v1/completions", bomb, headers=gzipped)
    assert (status, answer["error"]["param"]) == (413, "body")
    assert "at most 8000000 bytes" in answer["error"]["message"]
    path, body = complete(max_tokens=1)
    packed = gzip.compress(json.dumps(body).encode())
    assert (await post(rig, path, packed, headers=gzipped))[0] == 200
    assert made[0] <= 8_000_001 + len(json.dumps(body))
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    ("encoding", "data", "says"),
    [
        ("br", b"x", "Content-Encoding: 'br' is not allowed; must be gzip, deflate or identity"),
        ("gzip, gzip", b"x", "Content-Encoding"),
        ("gzip", b"plain", "must be gzip"),
        ("deflate", zlib.compress(b"{}")[:-1], "must be one whole deflate stream"),
        ("gzip", gzip.compress(b"{}", mtime=0) * 2, "must be one whole gzip stream"),
    ],
    ids=["unknown", "twice", "not gzip", "cut short", "two members"],
)
async def test_an_encoding_that_cannot_be_read(
    rig: Rig, encoding: str, data: bytes, says: str
) -> None:
    headers = {"Content-Encoding": encoding}
    status, _, answer = await post(rig, "/v1/completions", data, headers=headers)
    assert status == 400
    assert says in answer["error"]["message"]


async def test_a_body_that_never_ends_meets_the_deadline(tiny_model: Path) -> None:
    async with start_rig(tiny_model, request_timeout_s=0.1) as rig:
        reader, writer = await connection(rig.gateway.http_address)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 504 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()


async def connection(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = address.split(":")
    return await asyncio.open_connection(host, int(port))


async def closed(reader: asyncio.StreamReader) -> None:
    """Returns once the server has closed the connection."""
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 10)


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_head_that_is_never_finished_is_closed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    monkeypatch.setattr(http_limits, "HEAD_S", 0.2)
    async with start_rig(tiny_model) as rig:
        address = rig.gateway.http_address if door == "http" else rig.gateway.grpc_address
        heads = [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"]
        opened = []
        for head in heads if door == "http" else [b"", b"PRI * HT"]:
            opened.append(await connection(address))
            opened[-1][1].write(head)
        for reader, writer in opened:
            await closed(reader)
            writer.close()


async def test_a_connection_is_closed_where_no_further_head_comes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "IDLE_S", 0.2)
    async with start_rig(tiny_model) as rig:
        reader, writer = await connection(rig.gateway.http_address)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
        await closed(reader)
        writer.close()


async def test_the_oldest_connection_without_a_request_makes_room(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "MAX_SILENT", 2)
    async with start_rig(tiny_model) as rig:
        rig.prefills[0].gate.clear()
        held = asyncio.create_task(post(rig, *complete(max_tokens=2)))  # the oldest, but answered
        await until(lambda: rig.prefills[0].running)
        opened = []
        for _ in range(4):
            opened.append(await connection(rig.gateway.http_address))
            opened[-1][1].write(b"GET /health HT")
        for reader, _ in opened[:2]:
            await closed(reader)
        opened[3][1].write(b"TP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await asyncio.wait_for(opened[3][0].readline(), 10)
        rig.prefills[0].gate.set()
        assert (await held)[0] == 200
        for _, writer in opened:
            writer.close()


async def test_unknown_routes_and_methods(rig: Rig) -> None:
    status, _, answer = await post(rig, "/v1/nothing", {})
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    status, headers, _ = await post(rig, "/v1/models", {})
    assert (status, "GET" in headers["Allow"]) == (405, True)


async def test_an_unknown_model(rig: Rig) -> None:
    status, _, answer = await post(rig, *complete(model="gpt-9"))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "'gpt-9'" in answer["error"]["message"]


async def test_too_many_get_429_and_retry_after(tiny_model: Path) -> None:
    async with start_rig(tiny_model, max_active=1) as rig:
        rig.prefills[0].gate.clear()
        held = asyncio.create_task(post(rig, *complete(max_tokens=2)))
        await until(lambda: rig.prefills[0].running)
        for stream in (False, True):
            status, headers, answer = await post(rig, *complete(stream=stream))
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["Retry-After"]) >= 1
        rig.prefills[0].gate.set()
        assert (await held)[0] == 200


async def test_no_worker_gets_503_and_a_deadline_504(tiny_model: Path) -> None:
    async with start_rig(tiny_model, decodes=0, worker_wait_s=0.1) as rig:
        status, headers, answer = await post(rig, *complete(stream=True))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "no decode worker" in answer["error"]["message"]
    async with start_rig(tiny_model, request_timeout_s=0.1) as rig:
        rig.prefills[0].gate.clear()
        status, _, answer = await post(rig, *complete())
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")


async def test_an_error_after_the_first_token_is_an_event(rig: Rig) -> None:
    rig.decodes[0].fail_after = {3: worker_pb2.ERROR_CODE_INTERNAL}
    found = await events(rig, *complete(prompt="The capital of", stream=True, ignore_eos=True))
    last = json.loads(found[-1])
    assert "decode-0" in last["error"]["message"]
    assert "[DONE]" not in found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_the_workers(rig: Rig, stream: bool) -> None:
    rig.decodes[0].step_s = 0.005
    async with aiohttp.ClientSession() as session:
        body = {"prompt": "x y z", "max_tokens": 900, "stream": stream, "ignore_eos": True}
        asking = asyncio.create_task(session.post(f"{rig.url}/v1/completions", json=body))
        await until(lambda: rig.decodes[0].running)
        if stream:
            response = await asking
            await response.content.readline()
            response.close()
        else:
            asking.cancel()
    await until(lambda: rig.decodes[0].cancels and rig.idle)
    await until(lambda: rig.metric("requests_total", outcome="cancelled") == 1)


async def test_http_is_served_over_ipv6(tiny_model: Path) -> None:
    async with start_rig(tiny_model, http="[::1]:0") as rig, aiohttp.ClientSession() as session:
        assert rig.gateway.http_address.startswith("[::1]:")
        async with session.get(f"http://{rig.gateway.http_address}/health") as answer:
            assert answer.status == 200
