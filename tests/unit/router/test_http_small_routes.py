"""Small routes of the HTTP front door, CORS, and streams whose first token takes long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from gateway_rig import Rig, start_rig, until
from http_kit import complete, hello, post, say
from raw_http import connected, request

from crossdock.proto.v1 import worker_pb2
from crossdock.router.config import HttpSettings
from crossdock.router.frontdoor import openapi_answers
from crossdock.router.frontdoor.http_routes import NOT_OFFERED

TEXT = "Grüße aus Köln"


async def get(rig: Rig, path: str, **headers: str) -> tuple[int, Any, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(rig.url + path, headers=headers) as a,
    ):
        return a.status, a.headers, await a.json(content_type=None)


async def test_version_and_ping(rig: Rig) -> None:
    status, _, answer = await get(rig, "/version")
    assert (status, answer["version"][:1].isdigit()) == (200, True)
    assert (await get(rig, "/ping"))[0] == 200


async def test_tokenize_and_back(rig: Rig, text: Any) -> None:
    status, _, answer = await post(rig, "/tokenize", {"prompt": TEXT, "return_token_strs": True})
    ids = text.encode(TEXT)
    assert (status, answer["tokens"], answer["count"]) == (200, ids, len(ids))
    assert answer["max_model_len"] == text.context_length
    assert len(answer["token_strs"]) == len(ids)
    status, _, answer = await post(rig, "/detokenize", {"tokens": ids})
    assert (status, answer) == (200, {"prompt": TEXT})
    messages = [{"role": "user", "content": "hi"}]
    _, _, answer = await post(rig, "/tokenize", {"messages": messages})
    assert answer["tokens"] == text.apply_chat_template(messages)


@pytest.mark.parametrize(("path", "body", "field"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": False}, "add_special_tokens"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ("/detokenize", {"tokens": [True]}, "tokens[0]"),
])  # fmt: skip
async def test_what_cannot_be_tokenized(rig: Rig, path: str, body: Any, field: str) -> None:
    status, _, answer = await post(rig, path, body)
    assert (status, answer["error"]["param"]) == (400, field)


async def test_pages_of_allowed_origins_may_call(tiny_model: Path) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    ours, theirs = "https://a.example", "https://b.example"
    options = HttpSettings(cors=f"{ours} https://c.example")
    async with start_rig(tiny_model, http_options=options) as rig, aiohttp.ClientSession() as web:
        url = f"{rig.url}/v1/completions"
        async with web.options(url, headers=asks | {"Origin": ours}) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == ours
            assert answer.headers["Access-Control-Allow-Headers"] == "x-a"
        async with web.options(url, headers=asks | {"Origin": theirs}) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers
        for stream in (False, True):
            path, body = complete(max_tokens=1, stream=stream)
            async with web.post(rig.url + path, json=body, headers={"Origin": ours}) as answer:
                assert answer.headers["Access-Control-Allow-Origin"] == ours
                assert answer.headers["Vary"] == "Origin"
                readable = answer.headers["Access-Control-Expose-Headers"]
        assert {"X-Should-Retry", "X-RateLimit-Reset-Tokens"} < set(readable.split(", "))
    async with start_rig(tiny_model) as rig:
        _, headers, _ = await get(rig, "/health", Origin=ours)
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("fails", [False, True])
async def test_a_stream_says_that_it_lives_before_its_first_token(
    tiny_model: Path, fails: bool
) -> None:
    options = HttpSettings(keep_alive_s=0.1)
    async with start_rig(tiny_model, http_options=options) as rig, connected(rig) as raw:
        rig.prefills[0].gate.clear()
        if fails:
            rig.decodes[0].refusals.append(worker_pb2.ERROR_CODE_INTERNAL)
        await raw.send(request(json.dumps({"prompt": "x y z", "stream": True}).encode()))
        assert (await raw.answer())[0] == 200
        for _ in range(2):
            assert b": keep-alive" in await raw.reader.readuntil(b"\n\n")
        rig.prefills[0].gate.set()
        said = await raw.reader.readuntil(b'"error"' if fails else b"data: [DONE]\n\n")
        assert b'data: {"id":"cmpl-' in said or fails
        await until(lambda: rig.idle)


async def test_the_description_has_every_route_and_what_they_answer(rig: Rig, text: Any) -> None:
    status, _, found = await get(rig, "/openapi.json")
    assert status == 200
    routes = {
        resource.canonical
        for resource in rig.gateway._http.routes.resources()
        if resource.canonical not in NOT_OFFERED
    }
    assert routes == set(found["paths"])
    say(rig, text, TEXT)
    chat_body = hello(max_tokens=3, logprobs=True, top_logprobs=2)
    for kind, (path, body) in {
        openapi_answers.Completion: complete(max_tokens=3, logprobs=2),
        openapi_answers.ChatCompletion: ("/v1/chat/completions", chat_body),
        openapi_answers.Tokens: ("/tokenize", {"prompt": "x"}),
        openapi_answers.Text: ("/detokenize", {"tokens": [1]}),
        openapi_answers.ErrorAnswer: complete(n=0),
    }.items():
        _, _, answer = await post(rig, path, body)
        assert msgspec.to_builtins(msgspec.convert(answer, kind)) == answer  # nothing besides
    for kind, path in {
        openapi_answers.Models: "/v1/models", openapi_answers.Health: "/health",
        openapi_answers.Version: "/version",
    }.items():  # fmt: skip
        _, _, answer = await get(rig, path)
        assert msgspec.to_builtins(msgspec.convert(answer, kind)) == answer
