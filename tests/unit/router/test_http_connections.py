"""What a client can hold of the HTTP server, and HTTP that cannot be parsed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from pathlib import Path

import pytest
from gateway_rig import Rig, start_rig, until
from http_kit import complete, post
from raw_http import connected, request

from crossdock.router.config import HttpSettings
from crossdock.router.frontdoor import http_body, http_limits

ASK = json.dumps({"prompt": "x y z", "max_tokens": 4, "ignore_eos": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


# -- time ------------------------------------------------------------------------------------------


async def test_a_body_that_stops_coming_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "STALL_S", 0.1)
    monkeypatch.setattr(http_limits, "LINGER_S", 0.1)
    async with start_rig(tiny_model) as rig, connected(rig) as raw:
        await raw.send(HEAD + b'Content-Length: 99\r\n\r\n{"prompt')
        status, error = await raw.error()
        assert (status, error["code"], error["param"]) == (408, "request_stalled", "body")
        assert "must go on within 0.1 s" in error["message"]
        await raw.closed()


async def test_a_body_that_comes_byte_by_byte_has_its_time(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "WHOLE_S", 0.3)
    async with start_rig(tiny_model) as rig, connected(rig) as raw:
        await raw.send(HEAD + b"Content-Length: 999999\r\n\r\n")

        async def trickle() -> None:
            while True:
                await raw.send(b" ")
                await asyncio.sleep(0.01)

        slow = asyncio.create_task(trickle())
        status, error = await raw.error()
        slow.cancel()
        assert (status, error["code"]) == (408, "request_stalled")


async def test_answers_that_nobody_reads_are_given_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "WRITE_S", 0.1)
    body = json.dumps({"prompt": [7], "max_tokens": 900, "ignore_eos": True, "stream": True})
    async with start_rig(tiny_model) as rig:
        host, port = rig.gateway.http_address.split(":")
        for asked in (
            request(body.encode()) * 20,
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
        ):
            with socket.socket() as deaf:  # whose kernel takes little
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect((host, int(port)))
                deaf.sendall(asked)
                await until(lambda: rig.metric("http_connections"), 30)
                await until(lambda: not rig.metric("http_connections"), 30)
            await until(lambda: rig.idle, 30)


# -- memory ----------------------------------------------------------------------------------------


async def test_bodies_together_hold_a_bounded_amount(tiny_model: Path) -> None:
    options = HttpSettings(max_reading_mb=0.5)
    async with start_rig(tiny_model, max_body_mb=0.3, http_options=options) as rig:
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(connected(rig)) for _ in range(4)]
            for count, raw in enumerate(opened, 1):
                await raw.send(HEAD + b"Content-Length: 210000\r\n\r\n" + b" " * 200_000)
                held = min(count, 2) * 200_000
                await until(lambda held=held: rig.metric("http_reading_bytes") == held)
            for raw in opened[:2]:  # the oldest made room
                status, error = await raw.error()
                assert (status, error["type"]) == (429, "rate_limit_error")
            assert (await post(rig, *complete(max_tokens=1)))[0] == 200
        await until(lambda: rig.metric("http_reading_bytes") == 0)


# -- halves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_closed_its_side_alone_gets_its_answer(rig: Rig, stream: bool) -> None:
    rig.decodes[0].step_s = 0.02
    async with connected(rig) as raw:
        body = json.loads(ASK) | {"stream": stream}
        await raw.send(request(json.dumps(body).encode()))
        raw.writer.write_eof()
        rest = await asyncio.wait_for(raw.reader.read(), 20)
        assert b"HTTP/1.1 200 OK" in rest
        assert b'"finish_reason":"length"' in rest
    assert rig.metric("requests_total", outcome="ok") == 1


async def test_half_a_request_is_not_waited_for(rig: Rig) -> None:
    for sent in (b"", b"POST /v1/comp", HEAD + b"Content-Length: 99\r\n\r\n{"):
        async with connected(rig) as raw:
            await raw.send(sent)
            raw.writer.write_eof()
            await raw.closed()


async def test_a_client_that_is_gone_is_told_from_one_that_listens(rig: Rig) -> None:
    rig.prefills[0].gate.clear()
    async with connected(rig) as raw:
        await raw.send(request(ASK))
        await until(lambda: rig.prefills[0].running)
        raw.writer.close()  # both directions, as a cancelled client does
        await until(lambda: rig.prefills[0].cancels)
    assert rig.metric("requests_total", outcome="cancelled") == 1


# -- HTTP that cannot be parsed --------------------------------------------------------------------

MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no Host
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
    b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n",
]


@pytest.mark.parametrize("sent", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_http_gets_an_error_and_one_line_of_log(
    rig: Rig, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with connected(rig) as raw:
            await raw.send(sent)
            status, headers, body = await raw.answer()
            assert status in (400, 413)
            assert headers["content-type"].startswith("application/json")
            error = json.loads(body)["error"]
            assert error["type"] == "invalid_request_error"
            assert len(error["message"]) < 1000
            await raw.closed()
    (line,) = [r for r in caplog.records if "aiohttp" in r.name or "http_limits" in r.name]
    assert line.exc_info is None
    assert len(line.getMessage()) < 1000 and "\n" not in line.getMessage()
    assert rig.metric("requests_total", outcome="invalid") == 1


async def test_malformed_chunks_are_a_bad_request(rig: Rig) -> None:
    async with connected(rig) as raw:
        await raw.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n")
        await until(lambda: rig.metric("http_reading_bytes"))
        await raw.send(b"zz\r\n")
        status, error = await raw.error()
        assert (status, error["param"]) == (400, "body")
        await raw.closed()
    assert rig.metric("requests_total", outcome="internal") == 0


async def test_a_transfer_coding_that_nobody_undoes_is_refused(rig: Rig) -> None:
    async with connected(rig) as raw:
        await raw.send(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
        status, error = await raw.error()
        assert (status, error["param"]) == (400, "Transfer-Encoding")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nothing"])
async def test_an_expectation_that_nobody_meets(rig: Rig, path: str) -> None:
    async with connected(rig) as raw:
        await raw.send(request(ASK, "Expect: a miracle", path=path))
        status, error = await raw.error()
        assert (status, error["param"]) == (417, "Expect")


async def test_a_body_is_sent_for_once_it_is_expected(rig: Rig) -> None:
    async with connected(rig) as raw:
        head, _, body = request(ASK, "Expect: 100-continue").partition(b"\r\n\r\n")
        await raw.send(head + b"\r\n\r\n")
        assert b" 100 " in await asyncio.wait_for(raw.reader.readline(), 10)
        await raw.reader.readline()
        await raw.send(body)
        assert (await raw.answer())[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_in_pieces_that_is_none(rig: Rig, encoding: str) -> None:
    for body in (b"x" * 100_000, b"\x1f\x8b" + b"\0" * 50, b"\x1f"):
        async with connected(rig) as raw:
            await raw.send(request(body, f"Content-Encoding: {encoding}"))
            status, error = await raw.error()
            assert (status, error["param"]) == (400, "body")


# -- request ids -----------------------------------------------------------------------------------


async def test_every_answer_has_a_request_id(rig: Rig) -> None:
    for path, expected in {"/health": 200, "/nothing": 404, "/v1/completions": 405}.items():
        async with connected(rig) as raw:
            await raw.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r7\r\n\r\n".encode())
            status, headers, _ = await raw.answer()
            assert (status, headers["x-request-id"]) == (expected, "r7")
    async with connected(rig) as raw:
        await raw.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        first = (await raw.answer())[1]["x-request-id"]
        await raw.send(b"nonsense\r\n\r\n")
        second = (await raw.answer())[1]["x-request-id"]
        assert first != second
    async with connected(rig) as raw:
        long = "r" * 300
        await raw.send(f"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: {long}\r\n\r\n".encode())
        status, headers, _ = await raw.answer()
        assert (status, len(headers["x-request-id"])) == (400, 32)


async def test_the_end_of_a_stream_is_the_end_of_a_connection_that_knows_no_chunks(
    tiny_model: Path,
) -> None:
    body = json.dumps({"prompt": "x y z", "max_tokens": 4, "stream": True}).encode()
    asked = request(body, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    async with start_rig(tiny_model) as rig, connected(rig) as raw:
        await raw.send(asked)
        answer = await asyncio.wait_for(raw.reader.read(), 10)
        assert answer.endswith(b"data: [DONE]\n\n") and b"200 OK" in answer
