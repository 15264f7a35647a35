"""The order in which events are written, whoever writes them and however long that takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from crossdock.proto.types import FinishReason
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.frontdoor.http_stream import send_events


class Wire:
    """A response and its transport in one: everything that is written, in order."""

    def __init__(self) -> None:
        self.headers = {"Transfer-Encoding": "chunked"}
        self.sent = b""
        self.ended = asyncio.Event()

    async def write(self, data: bytes) -> None:
        self.sent += data

    async def write_eof(self, data: bytes) -> None:
        self.sent += data
        self.ended.set()


class Socket:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, chunk: bytes) -> None:
        self._wire.sent += chunk.split(b"\r\n")[1]


class Texts:
    """An answer whose events are the texts, and that can be held up."""

    request_id, ends_at_once = "r", True

    def __init__(self) -> None:
        self.prepared, self.kept = asyncio.Event(), asyncio.Event()
        self.prepared.set()
        self.kept.set()

    async def prepare(self, deltas: Sequence[Delta]) -> None:
        await self.prepared.wait()

    def event(self, delta: Delta) -> bytes:
        return delta.text.encode()

    def text_event(self, index: int, text: str) -> bytes:
        return text.encode()

    async def end(self) -> bytes:
        await self.kept.wait()
        return self.last_events()

    def last_events(self) -> bytes:
        return b"."


class Case:
    """A stream that is read, its first batch "a"."""

    def __init__(self) -> None:
        self.wire, self.answer = Wire(), Texts()
        self.stream = ResponseStream(lambda: None)
        self.task: asyncio.Task[None] | None = None

    def read(self) -> None:
        request: Any = SimpleNamespace(transport=Socket(self.wire))
        wire: Any = self.wire
        answer: Any = self.answer
        first = [Delta(0, "a", [1])]
        self.task = asyncio.create_task(send_events(request, wire, self.stream, answer, first))

    def finish(self, text: str) -> None:
        self.stream.push(Delta(0, text, [9], finish_reason=FinishReason.LENGTH))
        self.stream.end()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_tokens_do_not_overtake_a_batch_that_is_being_prepared() -> None:
    case = Case()
    case.answer.prepared.clear()
    case.read()
    await turns()
    case.stream.push_tokens(0, "b", [2])
    await turns()
    assert case.wire.sent == b""
    case.answer.prepared.set()
    await turns()
    case.stream.push_tokens(0, "c", [3])
    assert case.wire.sent == b"abc"  # in the turn in which it was pushed
    case.answer.prepared.clear()
    case.stream.push(Delta(1, "", [], finish_reason=FinishReason.STOP))  # is not for the sink
    await turns()
    case.stream.push_tokens(0, "d", [4])
    case.answer.prepared.set()
    await turns()
    case.finish("e")
    await case.wire.ended.wait()
    assert case.wire.sent == b"abcde."


async def test_the_last_event_does_not_wait_for_what_the_end_waits_for() -> None:
    case = Case()
    case.answer.ends_at_once = False
    case.answer.kept.clear()
    case.read()
    await turns()
    case.finish("b")
    await turns()
    assert case.wire.sent == b"ab" and not case.wire.ended.is_set()
    case.answer.kept.set()
    await case.wire.ended.wait()
    assert case.wire.sent == b"ab."


async def test_the_last_event_and_the_end_are_one_write() -> None:
    case, writes = Case(), list[bytes]()
    end = case.wire.write_eof

    async def write_eof(data: bytes) -> None:
        writes.append(data)
        await end(data)

    case.wire.write_eof = write_eof  # type: ignore[method-assign]
    case.read()
    await turns()
    case.finish("b")
    await case.wire.ended.wait()
    assert writes == [b"b."]
