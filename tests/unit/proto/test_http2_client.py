"""gRPC's calling end: what it says and hears, frame by frame; its ends; a peer's faults."""

from __future__ import annotations

import asyncio
from typing import Any

import hpack
import pytest
from call_kit import HEAD, OPEN, PATH, Caller

from crossdock.proto.http2 import client, frames
from crossdock.proto.http2.client import WINDOW_BYTES, ClientStream
from crossdock.proto.http2.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    PADDED,
    PREFACE,
    Code,
    Kind,
    Reader,
    Setting,
    frame,
    settings,
    window_update,
)
from crossdock.proto.http2.literals import block

WAIT_S = 100.0
MOST = 1000  # bytes of a message


def message(payload: bytes) -> bytes:
    return b"\0" + len(payload).to_bytes(4, "big") + payload


def data(payload: bytes, flags: int = 0, stream_id: int = 1) -> bytes:
    return frame(Kind.DATA, flags, stream_id, payload)


def trailers(*fields: tuple[str, str]) -> bytes:
    return frames.headers(1, block(fields), end=True)


class Transport(asyncio.Transport):
    """Keeps what is written, a write each."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = self.aborted = False
        self.buffered = 0

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """All that was written since the last call."""
        reader = Reader()
        reader.feed(b"".join(self.writes).removeprefix(PREFACE))
        self.writes.clear()
        return list(reader.frames())


class Side:
    """A stream that is connected to nothing."""

    def __init__(self, *messages: bytes, most: int = MOST) -> None:
        self.caller, self.transport = Caller(*messages), Transport()
        self.stream = ClientStream(PATH, self.caller, most)
        self.stream.connection_made(self.transport)

    def hear(self, *parts: bytes) -> None:
        self.stream.data_received(b"".join(parts))

    async def said(self) -> list[tuple[int, int, int, bytes]]:
        """What it writes in the turns of the loop until it rests."""
        before = -1
        while len(self.transport.writes) != before:
            before = len(self.transport.writes)
            await asyncio.sleep(0)
        return self.transport.frames()

    async def sent(self) -> bytes:
        """Payloads of DATA among that."""
        return b"".join(p for kind, _, _, p in await self.said() if kind == Kind.DATA)

    @property
    def reason(self) -> str | None:
        return self.stream.over.result() if self.stream.over.done() else None


async def test_the_call_is_the_first_that_is_said_and_one_write() -> None:
    side = Side(b"hello")
    await asyncio.sleep(0)
    (whole,) = side.transport.writes
    assert whole.startswith(PREFACE)
    first, room, head, said = side.transport.frames()
    given = frames.parse_settings(first[3])
    assert first[0] == Kind.SETTINGS and given[Setting.ENABLE_PUSH] == 0
    assert given[Setting.INITIAL_WINDOW_SIZE] == WINDOW_BYTES
    assert room[0] == Kind.WINDOW_UPDATE and room[2] == 0
    assert (head[0], head[1], head[2]) == (Kind.HEADERS, END_HEADERS, 1)
    fields = hpack.Decoder().decode(head[3])
    assert [name for name, _ in fields[:4]] == [":method", ":scheme", ":path", ":authority"]
    assert {":path": PATH, ":method": "POST", "te": "trailers"}.items() <= dict(fields).items()
    assert dict(fields)["content-type"] == "application/grpc"
    assert said == (Kind.DATA, 0, 1, message(b"hello"))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
async def test_messages_come_whole_however_they_are_cut(size: int) -> None:
    """Over frames, padding, CONTINUATION and reads."""
    three = message(b"one") + message(b"") + message(b"t" * 900)
    said = b"".join(
        (
            OPEN,
            data(three[:2]),
            data(b"\5" + three[2:9] + bytes(5), PADDED),
            data(b""),
            frame(77, 0xFF, 9, b"of a kind that nobody knows"),
            data(three[9:]),
            frame(Kind.HEADERS, END_STREAM, 1, block([("grpc-status", "9")])),
            frame(Kind.CONTINUATION, 0, 1, b""),
            frame(Kind.CONTINUATION, END_HEADERS, 1, block([("grpc-message", "50%25 %C3%BC")])),
        )
    )
    side = Side()
    for at in range(0, len(said), size):
        side.hear(said[at : at + size])
    assert side.caller.got == [b"one", b"", b"t" * 900]
    assert side.reason == "FAILED_PRECONDITION: 50% ü"
    assert side.transport.closed


def fields(*given: tuple[str, str]) -> bytes:
    return settings(()) + frames.headers(1, block(given), end=True)


LONG = message(bytes(MOST + 1))
ENDS: list[tuple[str, bytes, str]] = [
    ("all is well", OPEN + trailers(("grpc-status", "0")), ""),
    (
        "an answer of trailers alone",
        fields((":status", "200"), ("grpc-status", "7"), ("grpc-message", "no")),
        "PERMISSION_DENIED: no",
    ),
    ("no gRPC", fields((":status", "503")), "UNAVAILABLE: HTTP status 503"),
    (
        "a page",
        settings(()) + frames.headers(1, block([(":status", "200"), ("content-type", "a")]), False),
        "UNKNOWN: the answer's content type is a",
    ),
    ("no status", OPEN + trailers(("x", "y")), "UNKNOWN: the stream ended without a status"),
    ("an unknown status", OPEN + trailers(("grpc-status", "x")), "UNKNOWN: "),
    ("DATA ends it", OPEN + data(b"", END_STREAM), "INTERNAL: the stream ended without a status"),
    (
        "a message is cut short",
        OPEN + data(b"\0\0") + trailers(("grpc-status", "0")),
        "INTERNAL: the last message is cut short",
    ),
    (
        "compressed",
        OPEN + data(b"\1\0\0\0\0"),
        "INTERNAL: a compressed message, which was not asked for",
    ),
    (
        "too long",
        OPEN + data(LONG[:6]),
        "RESOURCE_EXHAUSTED: a message of 1001 bytes; at most 1000 are taken",
    ),
    ("refused", OPEN + frames.rst_stream(1, Code.REFUSED_STREAM), "UNAVAILABLE: reset with"),
    ("cancelled", OPEN + frames.rst_stream(1, Code.CANCEL), "CANCELLED: reset with CANCEL"),
    ("another reset", OPEN + frame(Kind.RST_STREAM, 0, 1, b"\0\0\0c"), "INTERNAL: reset with"),
    (
        "GOAWAY before the call",
        settings(()) + frames.goaway(0, Code.ENHANCE_YOUR_CALM, "too_many_pings"),
        "UNAVAILABLE: GOAWAY 11: too_many_pings",
    ),
]


@pytest.mark.parametrize("said,reason", [case[1:] for case in ENDS], ids=[case[0] for case in ENDS])
async def test_each_end_has_its_sentence(said: bytes, reason: str) -> None:
    side = Side()
    side.hear(said)
    assert side.reason is not None and side.reason.startswith(reason)
    assert side.reason or not reason
    assert side.transport.closed
    side.hear(data(message(b"late")))
    assert side.caller.got == []


FAULTS: list[tuple[str, bytes, Code]] = [
    ("no SETTINGS", frame(Kind.PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
    ("HTTP/1.1", b"HTTP/1.1 400 Bad Request\r\n\r\n", Code.FRAME_SIZE_ERROR),
    ("another stream", OPEN + data(b"", 0, 3), Code.PROTOCOL_ERROR),
    ("a pushed stream", OPEN + frame(Kind.PUSH_PROMISE, 4, 1, bytes(4)), Code.PROTOCOL_ERROR),
    ("DATA without a head", settings(()) + data(b"x"), Code.PROTOCOL_ERROR),
    ("a long frame", OPEN + b"\0\x40\x01\0\0\0\0\0\1", Code.FRAME_SIZE_ERROR),
    ("padding", OPEN + data(b"\5abc", PADDED), Code.PROTOCOL_ERROR),
    ("CONTINUATION", OPEN + frame(Kind.CONTINUATION, 4, 1), Code.PROTOCOL_ERROR),
    (
        "a head that is interrupted",
        settings(()) + frame(Kind.HEADERS, 0, 1, HEAD) + data(b""),
        Code.PROTOCOL_ERROR,
    ),
    (
        "a head without end",
        settings(())
        + frame(Kind.HEADERS, 0, 1)
        + frame(Kind.CONTINUATION, 0, 1, bytes(FRAME_BYTES)) * 5,
        Code.ENHANCE_YOUR_CALM,
    ),
    ("no head", settings(()) + frame(Kind.HEADERS, 4, 1, b"\xff\xff"), Code.COMPRESSION_ERROR),
    ("trailers that end nothing", OPEN + frames.headers(1, b"", False), Code.PROTOCOL_ERROR),
    ("PING", OPEN + frame(Kind.PING, 0, 0, b"x"), Code.FRAME_SIZE_ERROR),
    ("GOAWAY", OPEN + frame(Kind.GOAWAY, 0, 0, b"x"), Code.FRAME_SIZE_ERROR),
    ("a reset of all", OPEN + frames.rst_stream(0, Code.CANCEL), Code.PROTOCOL_ERROR),
    ("SETTINGS of a stream", frame(Kind.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    ("SETTINGS", OPEN + frame(Kind.SETTINGS, ACK, 0, b"x"), Code.FRAME_SIZE_ERROR),
    ("no room", OPEN + window_update(1, 0), Code.PROTOCOL_ERROR),
    ("endless room", OPEN + window_update(1, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    ("endless room of all", OPEN + window_update(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
]


@pytest.mark.parametrize("said,code", [case[1:] for case in FAULTS], ids=[c[0] for c in FAULTS])
async def test_a_peer_that_breaks_the_protocol_is_told_and_left(said: bytes, code: Code) -> None:
    side = Side()
    await side.said()
    side.hear(said)
    assert side.reason is not None and side.reason.startswith(f"INTERNAL: {code.name}: ")
    told = [payload for kind, _, _, payload in side.transport.frames() if kind == Kind.GOAWAY]
    assert [frames.number(payload, 4) for payload in told] == [code]
    assert side.transport.closed


async def test_more_than_the_window_is_a_fault() -> None:
    side = Side(most=2 * WINDOW_BYTES)
    side.hear(OPEN, data(b"\0" + WINDOW_BYTES.to_bytes(4, "big")))
    part = data(bytes(FRAME_BYTES))
    for _ in range(WINDOW_BYTES // FRAME_BYTES // 2):
        side.hear(part)
    updates = [frame for frame in await side.said() if frame[0] == Kind.WINDOW_UPDATE]
    assert sorted(stream_id for _, _, stream_id, _ in updates[1:]) == [0, 1]
    side.stream._room = FRAME_BYTES - 1
    side.hear(part)
    assert side.reason == "INTERNAL: FLOW_CONTROL_ERROR: more than the window"


async def test_what_has_no_room_waits_in_order() -> None:
    """The windows of stream and connection, and settings that change the former below nothing."""
    first, second = bytes(range(256)) * 400, b"second"
    side = Side(first, second)
    expected = message(first) + message(second)
    got = await side.sent()
    assert len(got) == frames.FIRST_WINDOW
    side.hear(OPEN, window_update(0, 10**6))
    assert await side.sent() == b""
    side.hear(settings([(Setting.INITIAL_WINDOW_SIZE, 100)]))
    side.hear(window_update(1, frames.FIRST_WINDOW - 100))
    assert await side.sent() == b""
    side.hear(window_update(1, 7))
    got += await side.sent()
    assert len(got) == frames.FIRST_WINDOW + 7
    side.hear(settings([(Setting.INITIAL_WINDOW_SIZE, 10**6)]))
    got += await side.sent()
    assert got == expected


async def test_frames_are_as_long_as_every_peer_takes_and_turns_are_bounded() -> None:
    large = bytes(3 * client.TURN_BYTES)
    side = Side(large)
    side.hear(settings([(Setting.INITIAL_WINDOW_SIZE, 10**7)]), window_update(0, 10**7))
    await asyncio.sleep(0)
    (whole,) = side.transport.writes
    assert len(whole) < client.TURN_BYTES + 2 * FRAME_BYTES
    said = [payload for kind, _, _, payload in await side.said() if kind == Kind.DATA]
    assert max(map(len, said)) == FRAME_BYTES and b"".join(said) == message(large)


async def test_a_full_transport_takes_no_messages_but_answers() -> None:
    side = Side()
    side.hear(OPEN)
    await side.said()
    side.stream.pause_writing()
    side.caller.messages.append(b"x")
    side.stream.wake()
    side.hear(frame(Kind.PING, 0, 0, b"12345678"))
    assert await side.said() == [(Kind.PING, ACK, 0, b"12345678")]
    side.stream.resume_writing()
    assert await side.sent() == message(b"x")
    side.stream.pause_writing()
    side.transport.buffered = client.CONTROL_BYTES + 1
    side.hear(frame(Kind.PING, 0, 0, b"12345678"))
    await side.said()
    assert (side.reason or "").startswith("RESOURCE_EXHAUSTED: the peer asks on")


async def test_the_end_is_told_once_and_by_a_reset() -> None:
    side = Side()
    await side.said()
    side.stream.end("first")
    side.stream.end("second")
    assert side.reason == "first" and side.transport.closed
    assert side.transport.frames() == [(Kind.RST_STREAM, 0, 1, b"\0\0\0\x08")]
    side.stream.connection_lost(None)
    await side.stream.gone()


async def test_a_connection_that_is_lost_says_what_the_peer_said() -> None:
    side = Side()
    side.hear(OPEN, frames.goaway(1, Code.NO_ERROR, "max_age"), data(message(b"goes on")))
    assert side.caller.got == [b"goes on"] and side.reason is None
    side.stream.connection_lost(None)
    assert side.reason == "UNAVAILABLE: GOAWAY 0: max_age"


async def test_a_message_that_is_all_that_came_is_taken_at_once_and_counted() -> None:
    """As one is that comes in parts: between them nothing is lost, and the window is the same."""
    whole, parts = Side(), Side()
    for side in (whole, parts):
        side.hear(OPEN)
    one, two = data(message(b"one")), data(message(b"two"))
    whole.hear(one)
    whole.hear(two)
    for at in range(len(one + two)):
        parts.hear((one + two)[at : at + 1])
    parts.hear(data(message(b"three")[:4]))
    parts.hear(data(message(b"three")[4:]))
    whole.hear(data(message(b"three")))
    assert whole.caller.got == parts.caller.got == [b"one", b"two", b"three"]
    assert whole.stream._room == parts.stream._room
    assert whole.stream._partial == parts.stream._partial == b""


async def test_a_message_is_not_taken_from_the_middle_of_another() -> None:
    """The rest of one may look like a frame with a message of its own."""
    side, inner = Side(), data(message(b"inner"))
    outer = data(message(inner))
    side.hear(OPEN, outer[: -len(inner)])
    side.hear(inner)
    assert side.caller.got == [inner]
    side.hear(data(message(b"x" * 30)[:-20]))
    side.hear(data(message(b"y")))
    assert side.caller.got == [inner]


LONE = data(message(b"m"))
NOT_LONE = [
    ("of a kind", 3, 1), ("flags", 4, END_STREAM), ("another stream", 8, 3),
    ("compressed", 9, 1), ("of a size", 13, 0), ("of another size", 13, 2),
]  # fmt: skip


@pytest.mark.parametrize("what, at, value", NOT_LONE, ids=[case[0] for case in NOT_LONE])
def test_only_a_plain_frame_of_one_whole_message_is_lone(what: str, at: int, value: int) -> None:
    assert frames.lone_message(LONE, 1) == b"m"
    changed = bytearray(LONE)
    changed[at] = value
    assert frames.lone_message(bytes(changed), 1) is None
    assert frames.lone_message(LONE + b"\0", 1) is None and frames.lone_message(b"", 1) is None


def test_a_frame_that_is_too_long_is_not_lone() -> None:
    assert frames.lone_message(frames.message_head(1 << 14, 1) + bytes(1 << 14), 1) is None
