"""HTTP/2 frames as bytes (RFC 9113, sections 4 to 7): pure functions."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
FRAME_BYTES = 1 << 14  # of a frame's payload: what every endpoint takes, and we at most
MAX_WINDOW = 2**31 - 1
FIRST_WINDOW = 65_535  # of a connection, and of streams until settings say otherwise

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

_HEAD = struct.Struct(">HBBBI")
_MESSAGE = struct.Struct(">HBBBIBI")  # of DATA, and gRPC's prefix of an uncompressed message
_SETTING = struct.Struct(">HI")
_TWO = struct.Struct(">II")
_ONE = struct.Struct(">I")
MESSAGE_BYTES = 5  # of gRPC's prefix
LONE_BYTES = HEAD_BYTES + MESSAGE_BYTES  # before a message in a frame of its own


class Kind(IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(IntEnum):
    """Error codes of RST_STREAM and GOAWAY."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(IntEnum):
    """Identifiers in SETTINGS."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ConnectionFault(Exception):
    """The peer broke the protocol in a way that ends the connection, with this code."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


class StreamFault(Exception):
    """The same for one stream."""

    def __init__(self, code: Code, stream_id: int, why: str) -> None:
        super().__init__(why)
        self.code, self.stream_id = code, stream_id


# -- what is sent ----------------------------------------------------------------------------------


def frame(kind: Kind, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame; the payload has at most FRAME_BYTES bytes."""
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def message_head(size: int, stream_id: int) -> bytes:
    """What comes before a gRPC message of `size` bytes that fits one DATA frame."""
    whole = size + MESSAGE_BYTES
    return _MESSAGE.pack(whole >> 8, whole & 0xFF, 0, 0, stream_id, 0, size)


def headers(stream_id: int, block: bytes, end: bool) -> bytes:
    """HEADERS, and CONTINUATION where the block is longer than a frame."""
    last = END_STREAM if end else 0
    first, rest = block[:FRAME_BYTES], block[FRAME_BYTES:]
    made = [frame(Kind.HEADERS, last | (0 if rest else END_HEADERS), stream_id, first)]
    while rest:
        part, rest = rest[:FRAME_BYTES], rest[FRAME_BYTES:]
        made.append(frame(Kind.CONTINUATION, 0 if rest else END_HEADERS, stream_id, part))
    return b"".join(made)


def settings(values: Iterable[tuple[Setting, int]]) -> bytes:
    """SETTINGS with these values."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values)
    return frame(Kind.SETTINGS, 0, 0, payload)


def rst_stream(stream_id: int, code: Code) -> bytes:
    """RST_STREAM."""
    return frame(Kind.RST_STREAM, 0, stream_id, _ONE.pack(code))


def goaway(last_stream_id: int, code: Code, why: str = "") -> bytes:
    """GOAWAY; `why` is for who debugs the peer."""
    debug = why.encode()[:256]
    return frame(Kind.GOAWAY, 0, 0, _TWO.pack(last_stream_id, code) + debug)


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE; stream 0 is the connection."""
    return frame(Kind.WINDOW_UPDATE, 0, stream_id, _ONE.pack(increment))


# -- what is received ------------------------------------------------------------------------------


class Reader:
    """Cuts what comes into frames."""

    __slots__ = ("_at", "_data")

    def __init__(self) -> None:
        self._data, self._at = b"", 0

    def feed(self, data: bytes) -> None:
        """This came."""
        rest = self._data[self._at :]
        self._data, self._at = rest + data if rest else data, 0

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, stream and payload of each frame that is whole by now; who stops in between
        gets the others by another call. Raises ConnectionFault for one that is longer than
        FRAME_BYTES."""
        data, end = self._data, len(self._data)
        while end - self._at >= HEAD_BYTES:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, self._at)
            size = high << 8 | low
            if size > FRAME_BYTES:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            start = self._at + HEAD_BYTES
            if end < start + size:
                break
            self._at = start + size
            yield kind, flags, stream_id & 0x7FFF_FFFF, data[start : self._at]
        self._data, self._at = data[self._at :], 0

    @property
    def waits(self) -> bool:
        """Part of a frame is here."""
        return len(self._data) > self._at


def lone_message(data: bytes, stream_id: int) -> bytes | None:
    """The gRPC message, not compressed, of a DATA frame of this stream that is all of `data` and
    has neither flags nor anything else in it; None where that is not what it is."""
    if len(data) < LONE_BYTES:
        return None
    high, low, kind, flags, stream, compressed, size = _MESSAGE.unpack_from(data)
    if kind or flags or compressed or stream != stream_id:
        return None
    whole = size + MESSAGE_BYTES
    if whole + HEAD_BYTES != len(data) or high << 8 | low != whole or whole > FRAME_BYTES:
        return None
    return data[LONE_BYTES:]


def unpadded(flags: int, payload: bytes, stream_id: int) -> bytes:
    """The payload of DATA or HEADERS without its padding. Raises ConnectionFault."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, f"padding of stream {stream_id}")
    return payload[1 : len(payload) - payload[0]]


def unprioritized(flags: int, payload: bytes, stream_id: int) -> bytes:
    """The payload of HEADERS without its priority, which nobody heeds. Raises ConnectionFault."""
    if not flags & PRIORITIZED:
        return payload
    if len(payload) < 5:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"priority of stream {stream_id}")
    return payload[5:]


def number(payload: bytes | bytearray, at: int = 0) -> int:
    """The 32 bits at an offset."""
    return int(_ONE.unpack_from(payload, at)[0])


def parse_settings(payload: bytes) -> dict[int, int]:
    """The values of SETTINGS, known or not. Raises ConnectionFault for one that is not allowed."""
    if len(payload) % _SETTING.size:
        raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
    given = list(_SETTING.iter_unpack(payload))
    for setting, value in given:
        if setting == Setting.ENABLE_PUSH and value > 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
        if setting == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
        if setting == Setting.MAX_FRAME_SIZE and not FRAME_BYTES <= value < 1 << 24:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
    return dict(given)  # of one that is given twice the last value counts
