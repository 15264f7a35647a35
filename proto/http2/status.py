"""How a call has ended, in gRPC's words: "CODE: details"."""

from __future__ import annotations

from urllib.parse import unquote

import grpc

from crossdock.proto.http2.frames import Code

_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
# As gRPC's own ends have it.
_OF_HTTP = {
    b"400": "INTERNAL",
    b"401": "UNAUTHENTICATED",
    b"403": "PERMISSION_DENIED",
    b"404": "UNIMPLEMENTED",
    b"429": "UNAVAILABLE",
    b"502": "UNAVAILABLE",
    b"503": "UNAVAILABLE",
    b"504": "UNAVAILABLE",
}
_OF_RESET = {
    Code.REFUSED_STREAM: "UNAVAILABLE",
    Code.CANCEL: "CANCELLED",
    Code.ENHANCE_YOUR_CALM: "RESOURCE_EXHAUSTED",
}


def refused(fields: dict[bytes, bytes]) -> str:
    """Why an answer with this head is none of gRPC; empty where it is."""
    http = fields.get(b":status", b"none")
    if http != b"200":
        return f"{_OF_HTTP.get(http, 'UNKNOWN')}: HTTP status {_text(http)}"
    kind = fields.get(b"content-type", b"none")
    if not kind.startswith(b"application/grpc"):
        return f"UNKNOWN: the answer's content type is {_text(kind)}"
    return ""


def of_trailers(fields: dict[bytes, bytes], *, cut_short: bool) -> str:
    """Of trailers, or of a head that is all of an answer; `cut_short`: a message was not whole.
    Empty where all is well."""
    said = fields.get(b"grpc-status")
    if said is None:
        trailers = b":status" not in fields
        return ("" if trailers else refused(fields)) or "UNKNOWN: the stream ended without a status"
    if said == b"0":
        return "INTERNAL: the last message is cut short" if cut_short else ""
    name = _NAMES.get(int(said), "UNKNOWN") if said.isdigit() else "UNKNOWN"
    return f"{name}: {unquote(_text(fields.get(b'grpc-message', b'')))}"


def of_reset(code: int) -> str:
    """Of RST_STREAM."""
    known = Code(code) if code in Code.__members__.values() else None
    name = f"error {code}" if known is None else known.name
    return f"{_OF_RESET.get(known, 'INTERNAL') if known else 'INTERNAL'}: reset with {name}"


def _text(value: bytes) -> str:
    return value[:1000].decode("latin-1")
