"""The OpenAI HTTP front door over real sockets: the unmodified `openai` package, and raw bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from gateway_rig import Rig
from http_kit import SAID, events, hello, post, say

from crossdock.proto.v1 import worker_pb2

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as made:
        yield made


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


@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["text", "tools"])
async def test_usage_so_far_in_each_event(
    rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str, tools: list[Any]
) -> None:
    count = say(rig, text, "Grüße 🙂 Paris")
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=count,
            n=2,
            tools=tools,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        )
    ]
    *content, last = chunks
    assert last.usage is not None and last.usage.completion_tokens == 2 * count
    for index in (0, 1):
        told = [c.usage for c in content if c.choices[0].index == index]
        tokens = [usage.completion_tokens for usage in told if usage is not None]
        assert len(tokens) == len(told) and tokens == sorted(tokens) and tokens[-1] == count
        assert {usage.prompt_tokens for usage in told if usage} == {last.usage.prompt_tokens}
        assert all(u.total_tokens == u.prompt_tokens + u.completion_tokens for u in told if u)


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
        f'crossdock_ttft_seconds_count{{model="{rig.only.name}"}} 1.0',
        f'crossdock_itl_seconds_count{{model="{rig.only.name}"}} 2.0',
        "crossdock_generated_tokens_total 3.0",
        'crossdock_workers{role="decode"} 1.0',
        "crossdock_active_sequences 0.0",
    ):
        assert line in exposition, line
