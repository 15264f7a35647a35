"""What is asked by HTTP and refused: fields, bodies, encodings, routes."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from gateway_rig import Rig
from http_kit import chat, complete, hello, post

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


def bare_deflate(data: bytes) -> bytes:
    """Without zlib's header and checksum."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("pack", [zlib.compress, bare_deflate])
async def test_deflate_comes_with_and_without_a_header(
    rig: Rig, pack: Callable[[bytes], bytes]
) -> None:
    path, body = complete(max_tokens=1)
    deflated = {"Content-Encoding": "deflate"}
    assert (await post(rig, path, pack(json.dumps(body).encode()), headers=deflated))[0] == 200
    status, _, answer = await post(rig, path, pack(bytes(9_000_000)), headers=deflated)
    assert (status, answer["error"]["param"]) == (413, "body")


@pytest.mark.parametrize(
    ("encoding", "data", "says"),
    [
        ("br", b"x", "Content-Encoding: 'br' is not allowed; must be gzip, deflate or identity"),
        ("gzip, gzip", b"x", "Content-Encoding"),
        ("gzip", b"plain", "must be gzip"),
        ("deflate", zlib.compress(b"{}")[:-1], "must be one whole deflate stream"),
        ("deflate", bare_deflate(b"{}")[:-1], "must be one whole deflate stream"),
        ("deflate", bare_deflate(b"{}") + b"x", "must be one whole deflate stream"),
        ("deflate", b"", "must be one whole deflate stream"),
        ("gzip", gzip.compress(b"{}", mtime=0) * 2, "must be one whole gzip stream"),
    ],
    ids=["unknown", "twice", "not gzip", "cut", "cut bare", "more", "empty", "two members"],
)
async def test_an_encoding_that_cannot_be_read(
    rig: Rig, encoding: str, data: bytes, says: str
) -> None:
    headers = {"Content-Encoding": encoding}
    status, _, answer = await post(rig, "/v1/completions", data, headers=headers)
    assert status == 400
    assert says in answer["error"]["message"]


async def test_unknown_routes_and_methods(rig: Rig) -> None:
    status, _, answer = await post(rig, "/v1/nothing", {})
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    status, headers, _ = await post(rig, "/v1/models", {})
    assert (status, "GET" in headers["Allow"]) == (405, True)


async def test_an_unknown_model(rig: Rig) -> None:
    status, _, answer = await post(rig, *complete(model="gpt-9"))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "'gpt-9'" in answer["error"]["message"]
