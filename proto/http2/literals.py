"""Header fields as they are sent: literals that touch no table (RFC 7541), so that a block is the
same bytes each time."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable


def block(fields: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Fields as literals. A name that ends in -bin has base64 of its bytes."""
    parts: list[bytes] = []
    for name, value in fields:
        raw = (
            b64encode(value).rstrip(b"=")
            if isinstance(value, bytes)
            else value.encode("latin-1", "replace")
        )
        parts += (b"\0", _length(len(name)), name.encode("ascii"), _length(len(raw)), raw)
    return b"".join(parts)


def _length(value: int) -> bytes:
    """An integer with a prefix of 7 bits (RFC 7541, 5.1)."""
    if value < 127:
        return bytes((value,))
    value, made = value - 127, bytearray(b"\x7f")
    while value >= 128:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
