"""What is asked by HTTP and refused: fields, bodies, encodings, routes."""

from __future__ import annotations

import codecs
import gzip
import json
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_rig import Rig, start_rig
from http_kit import chat, complete, hello, post

from crossdock.proto.v1 import worker_pb2
from crossdock.router.config import HttpSettings

LONG = "word " * 2500
TEXT_PART = {"type": "text", "text": "x"}
BAD = [
    (complete(prompt=""), "prompt", "empty"),
    (complete(prompt=[]), "prompt", "empty"),
    (complete(prompt=None), "prompt", "null is not allowed; is required"),
    (complete(prompt=[[]]), "prompt", "empty"),
    (complete(prompt=["a", ""]), "prompt[1]", "empty"),
    (complete(prompt={"a": 1}), "prompt", "must be a string"),
    (complete(prompt=["a", 1.5]), "prompt[1]", "1.5"),
    (complete(prompt=[True]), "prompt[0]", "true is not allowed"),
    (complete(prompt=[5] * 5000 + [None]), "prompt[5000]", "null is not allowed"),
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
    (complete(n=True), "n", "true is not allowed; must be an integer or null"),
    (complete(echo="yes"), "echo", "must be true or false or null"),
    (complete(n="\ud800"), "n", "U+D800"),
    (complete(**{"\ud800": 1}), "\\ud800", "U+D800"),
    (complete(user={"a": ["\udc00"]}), "user.a[0]", "U+DC00"),
    (complete(temperature=float("nan")), "temperature", "NaN"),
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
    (complete(best_of=17), "best_of", "from n = 1 to 16"),
    (complete(best_of=1, n=2), "best_of", "from n = 2 to 16"),
    (complete(best_of=3, stream=True), "best_of", "cannot be streamed"),
    (complete(best_of=3, temperature=0), "best_of", "all would be equal"),
    (complete(best_of=3, max_tokens=0, echo=True), "best_of", "all would be equal"),
    (complete(max_tokens=0), "max_tokens", "at least 1, or 0 where"),
    (complete(max_tokens=-1, echo=True), "max_tokens", "-1"),
    (complete(max_tokens=0, min_tokens=1, echo=True), "min_tokens", "from 0 to 0"),
    (complete(prompt_logprobs=21), "prompt_logprobs", "20"),
    (complete(prompt_logprobs=-1), "prompt_logprobs", "-1"),
    (complete(prompt_logprobs=0, stream=True), "prompt_logprobs", "in a stream"),
    (chat(prompt_logprobs=1, stream=True), "prompt_logprobs", "in a stream"),
    (chat(best_of=2), "best_of", "not supported"),
    (chat(max_tokens=0), "max_tokens", "at least 1, or 0 where"),
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
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
    (chat(tools=[{"type": "function"}]), "tools[0].function", "an object"),
    (chat(max_completion_tokens=-1), "max_completion_tokens", "-1"),
]


CONTEXT = {"2047 tokens", "2048", "at most 48", "2047"}


def code_of(says: str) -> str:
    """What litellm and others look for, where a request is too long for the model."""
    return "context_length_exceeded" if says in CONTEXT else "invalid_request"


@pytest.mark.parametrize(("call", "field", "says"), BAD, ids=[f"{f}-{s}" for _, f, s in BAD])
async def test_bad_input_is_refused_by_name(
    rig: Rig, call: tuple[str, Any], field: str, says: str
) -> None:
    status, _, answer = await post(rig, *call)
    assert status == 400
    error = answer["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code_of(says)
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
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": 1, "prompt": "x", "n": 2}', "'given twice'"),
        (b'{"a": {"b": 1, "b": 1}}', "'given twice'"),
        (b'{"max_tokens": ' + b"9" * 10_000 + b"}", "4300 digits"),
    ],
)
async def test_a_body_that_cannot_be_read(rig: Rig, body: bytes, says: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, answer = await post(rig, path, body)
        assert status == 400
        assert answer["error"]["param"] == {b'{"n"': "n", b'{"a"': "b"}.get(body[:4], "body")
        assert says in answer["error"]["message"]


async def test_a_byte_order_mark_is_no_part_of_the_body(rig: Rig) -> None:
    data = codecs.BOM_UTF8 + b'{"prompt": "x", "max_tokens": 1}'
    assert (await post(rig, "/v1/completions", data))[0] == 200


@pytest.mark.parametrize(("given", "status"), [
    ("application/json; charset=utf-8", 200), ("application/vnd.api+json", 200),
    ("text/plain", 415), ("application/x-www-form-urlencoded", 415),
])  # fmt: skip
async def test_a_body_must_be_said_to_be_json(rig: Rig, given: str, status: int) -> None:
    path, body = complete(max_tokens=1)
    found, _, answer = await post(rig, path, body, headers={"Content-Type": given})
    assert found == status
    if status == 415:
        assert answer["error"]["code"] == "unsupported_media_type"
        assert answer["error"]["param"] == "Content-Type"


SILENT_NO_MORE = [
    complete(bad_words=["x"]),
    complete(truncate_prompt_tokens=3), chat(best_of=2, n=1),
    complete(skip_special_tokens=False), complete(include_stop_str_in_output=True),
    complete(allowed_token_ids=[1]), complete(use_beam_search=True), complete(length_penalty=2),
    chat(chat_template="x"), chat(functions=[{}]), chat(function_call={"name": "f"}),
    complete(tools=[{}]), complete(chat_template_kwargs={"a": 1}), complete(reasoning_effort="low"),
]  # fmt: skip


@pytest.mark.parametrize("call", SILENT_NO_MORE, ids=[list(c[1])[1] for c in SILENT_NO_MORE])
async def test_what_changes_the_answer_is_refused_by_name(rig: Rig, call: tuple[str, Any]) -> None:
    status, _, answer = await post(rig, *call)
    assert (status, answer["error"]["param"]) == (400, list(call[1])[1])
    assert "is not supported by this server" in answer["error"]["message"]


async def test_what_changes_a_message_is_refused_by_name(rig: Rig) -> None:
    for field, value in {"function_call": {"name": "f"}, "prefix": True, "refusal": "no"}.items():
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", field: value}]
        status, _, answer = await post(rig, *chat(messages=messages))
        assert (status, answer["error"]["param"]) == (400, f"messages[1].{field}")


async def test_unknown_fields_are_ignored_or_refused_as_configured(tiny_model: Path) -> None:
    unknown = [
        ("tempreature", complete(tempreature=0.5)),
        ("messages[0].colour", chat(messages=[{"role": "user", "content": "x", "colour": 1}])),
        ("stream_options.usage", complete(stream_options={"usage": True})),
        (
            "messages[0].content[0].colour",
            chat(messages=[{"role": "user", "content": [TEXT_PART | {"colour": 1}]}]),
        ),
    ]
    known = hello(max_tokens=1, user="me", metadata={"a": "b"}, store=False, tools=[])
    known["messages"][0] |= {"name": "Ann", "content": [TEXT_PART | {"cache_control": {}}]}
    known["stream_options"] = {"continuous_usage_stats": True, "include_obfuscation": False}
    for strict in (False, True):
        async with start_rig(tiny_model, http_options=HttpSettings(strict=strict)) as rig:
            for field, (path, body) in unknown:
                status, _, answer = await post(rig, path, body | {"max_tokens": 1})
                assert status == (400 if strict else 200)
                assert not strict or answer["error"]["param"] == field
                assert not strict or "gateway.http_options.strict" in answer["error"]["message"]
            assert (await post(rig, "/v1/chat/completions", known))[0] == 200


async def test_every_answer_that_is_an_error_is_counted_once(rig: Rig) -> None:
    rig.decodes[0].refusals.append(worker_pb2.ERROR_CODE_INTERNAL)
    for count, (outcome, call) in enumerate(
        [
            ("invalid", complete(n="\ud800")),
            ("invalid", ("/v1/completions", b"{")),
            ("not_found", complete(model="gpt-9")),
            ("not_found", ("/v1/nothing", {})),
            ("internal", complete(prompt="x y z")),
        ],
        1,
    ):
        before = rig.metric("requests_total", outcome=outcome)
        assert (await post(rig, *call))[0] >= 400
        assert rig.metric("requests_total", outcome=outcome) == before + 1
        samples = next(m for m in rig.gateway.metrics.requests.collect()).samples
        assert sum(s.value for s in samples if s.name.endswith("_total")) == count


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

    json_ = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{rig.url}/v1/completions", data=chunks(), headers=json_)
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


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/moderations", "/v1/images/generations"])
async def test_what_a_text_model_does_not_offer(rig: Rig, path: str) -> None:
    status, _, answer = await post(rig, path, {"input": "x"})
    assert (status, answer["error"]["code"]) == (404, "not_offered")
    assert "not offered here" in answer["error"]["message"]


async def test_kserve_clients_get_an_error_that_is_a_text(rig: Rig) -> None:
    status, _, answer = await post(rig, "/v2/models/x/infer", {})
    assert status == 404
    assert isinstance(answer["error"], str)
