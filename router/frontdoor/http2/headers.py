"""Heads and trailers of gRPC calls: metadata, status.

What is sent is encoded as literals that touch no table: a head is then the same bytes each time.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote_from_bytes

from crossdock.proto.http2 import compression
from crossdock.proto.http2.compression import HEAD_LIST_BYTES
from crossdock.proto.http2.frames import Code, StreamFault
from crossdock.proto.http2.literals import block as block

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Fields: TypeAlias = list[compression.Field]

PSEUDO = {b":method", b":scheme", b":authority", b":path"}
NEEDED = {b":method", b":scheme", b":path"}
FORBIDDEN = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
RESERVED = {"te", "content-type", "content-length", "host"}  # beside grpc-*: no metadata
SHRUNK_TABLE = b"\x20"  # a table of 0 bytes, as who allows less than the usual is to be told
MOST_DETAILS = 1000  # characters of a status message; clients bound what trailers they take
KNOWN_BYTES = 4096  # of the heads of a connection that are kept
_OF_NAMES = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
_BAD_VALUE = re.compile(rb"[\0\r\n]")
_DIGITS = re.compile(rb"\d{1,18}")
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # of a status message


class BadHead(Exception):
    """A head that no gRPC call has; `status` is HTTP's, and 200 means gRPC's INVALID_ARGUMENT."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """What a call's head says."""

    path: str
    metadata: Metadata
    timeout_s: float | None
    encoding: str  # of compressed messages
    length: int | None = None  # bytes of DATA, where it says
    size: int = 0  # bytes of its fields, as SETTINGS_MAX_HEADER_LIST_SIZE counts them


# -- what is received ------------------------------------------------------------------------------


class Decoder:
    """Heads of one connection. One that is made of nothing but what the table holds is decoded once
    until the table changes: callers repeat themselves."""

    __slots__ = ("_known", "_known_at", "_known_bytes", "_table")

    def __init__(self) -> None:
        self._table = compression.Table()
        self._known: dict[bytes, Head] = {}
        self._known_at = 0  # changes of the table
        self._known_bytes = 0

    def head(self, block: bytes, stream_id: int) -> Head:
        """What the block says. Raises BadHead, StreamFault where it is malformed, ConnectionFault
        where the table is lost."""
        table = self._table
        if table.changes != self._known_at:
            self._known, self._known_at, self._known_bytes = {}, table.changes, 0
        known = self._known.get(block)
        if known is not None:
            return known
        head = parse_head(*compression.decode(block, table), stream_id)
        if _indexed(block) and self._known_bytes + head.size <= KNOWN_BYTES:
            self._known[block] = head
            self._known_bytes += head.size
        return head

    def fields(self, block: bytes) -> Fields:
        """The fields of any block. Raises ConnectionFault."""
        return compression.decode(block, self._table)[0]


def _indexed(block: bytes) -> bool:
    """It is made of indices of one byte alone, and so leaves the table as it is."""
    return bool(block) and min(block) >= 0x80 and max(block) < 0xFF


def parse_head(fields: Fields, size: int, stream_id: int) -> Head:
    """A call's head, whose fields have `size` bytes together. Raises StreamFault for what HTTP/2
    does not allow, BadHead for what no gRPC call says."""
    if size > HEAD_LIST_BYTES:
        raise BadHead(431, f"the head has more than {HEAD_LIST_BYTES} bytes")
    pseudo = _pseudo(fields, stream_id)
    # gRPC lets blanks around a value be stripped, and its clients send them.
    regular = [(name, value.strip(b" \t")) for name, value in fields if name[:1] != b":"]
    check_fields(regular, stream_id)
    length = _length_of(regular, stream_id)
    if pseudo[b":method"] != b"POST":
        raise BadHead(405, "gRPC calls are POST")
    plain = {name: value.decode("latin-1") for name, value in regular}
    content_type = plain.get(b"content-type", "")
    if not re.match(r"application/grpc($|[+;])", content_type):
        raise BadHead(415, "gRPC calls have the content type application/grpc")
    timeout = plain.get(b"grpc-timeout")
    return Head(
        path=pseudo[b":path"].decode("latin-1"),
        metadata=tuple(_metadata(regular)),
        timeout_s=None if timeout is None else timeout_s(timeout),
        encoding=plain.get(b"grpc-encoding", "identity"),
        length=length,
        size=size,
    )


def _pseudo(fields: Fields, stream_id: int) -> dict[bytes, bytes]:
    """The pseudo-header fields, which come first and once."""
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name[:1] != b":":
            break
        if name in found or name not in PSEUDO or _BAD_VALUE.search(value):
            raise StreamFault(Code.PROTOCOL_ERROR, stream_id, f"the field {name!r}")
        found[name] = value
    late = any(name[:1] == b":" for name, _ in fields[len(found) :])
    if late or not found.keys() >= NEEDED or not found[b":path"]:
        raise StreamFault(Code.PROTOCOL_ERROR, stream_id, "pseudo-header fields")
    return found


def check_fields(fields: Fields, stream_id: int) -> None:
    """Of a head after its pseudo-header fields, or of trailers. Raises StreamFault."""
    for name, value in fields:
        wrong = name in FORBIDDEN or (name == b"te" and value != b"trailers")
        if wrong or not name or name.translate(None, _OF_NAMES) or _BAD_VALUE.search(value):
            raise StreamFault(Code.PROTOCOL_ERROR, stream_id, f"the field {name[:64]!r}")


def _length_of(fields: Fields, stream_id: int) -> int | None:
    """What content-length says, once or the same more than once."""
    said = {value for name, value in fields if name == b"content-length"}
    if not said:
        return None
    if len(said) > 1 or not _DIGITS.fullmatch(value := said.pop()):
        raise StreamFault(Code.PROTOCOL_ERROR, stream_id, "content-length")
    return int(value)


def _metadata(fields: Fields) -> Iterable[tuple[str, str | bytes]]:
    for raw, value in fields:
        name = raw.decode("ascii")
        if name.startswith("grpc-") or name in RESERVED:
            continue
        if not name.endswith("-bin"):
            yield name, value.decode("latin-1")
            continue
        for part in value.split(b","):
            try:
                yield name, b64decode(part.strip() + b"=" * (-len(part.strip()) % 4), validate=True)
            except binascii.Error:
                raise BadHead(200, f"{name} is not base64") from None


def timeout_s(value: str) -> float:
    """Of grpc-timeout, in seconds. Raises BadHead."""
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise BadHead(200, f"grpc-timeout is up to 8 digits and a unit, not {value[:32]!r}")
    return int(match[1]) * _UNITS[match[2]]


# -- what is sent ----------------------------------------------------------------------------------


HEAD = b"\x88" + block(  # 0x88 is :status 200
    [("content-type", "application/grpc"), ("grpc-accept-encoding", "identity, gzip")]
)
DONE = block([("grpc-status", "0")])


def trailers(code: int, details: str, metadata: Metadata) -> bytes:
    """The status of a call, and its trailing metadata."""
    made = DONE if code == 0 else block([("grpc-status", str(code))])
    if details:
        details = details[:MOST_DETAILS]
        message = quote_from_bytes(details.encode("utf-8", "replace"), safe=_PLAIN)
        made += block([("grpc-message", message)])
    return made + block(metadata)


def refusal(bad: BadHead) -> bytes:
    """The answer to what is no gRPC call."""
    fields = [(":status", str(bad.status)), ("content-type", "application/grpc")]
    return block(fields) + trailers(3 if bad.status == 200 else 2, str(bad), ())
