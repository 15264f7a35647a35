"""Header compression (RFC 7541) as it is received: what a head costs is a few steps a field.

hpack's decoder, which the tests compare this one with, copies the rest of the block for each field
and takes Huffman's code by the nibble; of hpack there are the two tables of the RFC here.
"""

from __future__ import annotations

from typing import TypeAlias

from hpack.table import HeaderTable

from crossdock.proto.http2 import huffman
from crossdock.proto.http2.frames import Code, ConnectionFault

Field: TypeAlias = tuple[bytes, bytes]

HEAD_LIST_BYTES = 1 << 14  # of one head's fields that are kept
DECODED_BYTES = 1 << 16  # of a head that is decoded at all, for what others on it depend on
TABLE_BYTES = 4096  # of the table that both ends keep
ENTRY_BYTES = 32  # that a field costs beside its own (4.1)
_STATIC: tuple[Field, ...] = HeaderTable.STATIC_TABLE
MOST_RESIZED = 2  # changes of the table's size in one block (4.2)
_MOST_SHIFT = 21  # of an integer: beyond it is more than any length or index here


class Table:
    """The fields that a client may refer to by number."""

    __slots__ = ("_fields", "_limit", "_size", "changes")

    def __init__(self) -> None:
        self._fields: list[Field] = []  # the newest last
        self._size = 0
        self._limit = TABLE_BYTES
        self.changes = 0  # ever

    def field(self, index: int) -> Field:
        """By its number, from 1. Raises ValueError."""
        if not 0 < index <= len(_STATIC) + len(self._fields):
            raise ValueError(f"no field has the index {index}")
        return _STATIC[index - 1] if index <= len(_STATIC) else self._fields[len(_STATIC) - index]

    def add(self, field: Field) -> None:
        """The newest, for which the oldest make room."""
        self.changes += 1
        self._size += ENTRY_BYTES + len(field[0]) + len(field[1])
        self._fields.append(field)
        self._shrink()

    def resize(self, limit: int) -> None:
        """Raises ValueError where it is more than we allow."""
        if limit > TABLE_BYTES:
            raise ValueError(f"a table of {limit} bytes; at most {TABLE_BYTES} are allowed")
        self.changes += 1
        self._limit = limit
        self._shrink()

    def _shrink(self) -> None:
        gone = 0
        while self._size > self._limit:
            name, value = self._fields[gone]
            self._size -= ENTRY_BYTES + len(name) + len(value)
            gone += 1
        del self._fields[:gone]


def decode(block: bytes, table: Table) -> tuple[list[Field], int]:
    """The fields of a block, and their size as SETTINGS_MAX_HEADER_LIST_SIZE counts it; those that
    begin beyond HEAD_LIST_BYTES are left out. Raises ConnectionFault, since the table is lost."""
    try:
        return _decode(block, table)
    except IndexError:
        raise ConnectionFault(Code.COMPRESSION_ERROR, "a head that is cut short") from None
    except ValueError as error:
        raise ConnectionFault(Code.COMPRESSION_ERROR, f"a head: {error}") from None


def _decode(block: bytes, table: Table) -> tuple[list[Field], int]:
    found: list[Field] = []
    at, size, end, resized = 0, 0, len(block), 0
    while at < end:
        first = block[at]
        at += 1
        if first >= 0x80:
            index = first & 0x7F
            if index == 0x7F:
                index, at = _longer(block, at, index)
            field = table.field(index)
        elif 0x20 <= first < 0x40:
            if size:
                raise ValueError("the table's size changes after a field")
            limit = first & 0x1F
            if limit == 0x1F:
                limit, at = _longer(block, at, limit)
            table.resize(limit)
            resized += 1
            if resized > MOST_RESIZED:
                raise ValueError("the table's size changes again and again")
            continue
        else:
            prefix = 0x3F if first >= 0x40 else 0x0F
            index = first & prefix
            if index == prefix:
                index, at = _longer(block, at, index)
            if index:
                name = table.field(index)[0]
            else:
                name, at = _string(block, at)
            value, at = _string(block, at)
            field = name, value
            if first >= 0x40:
                table.add(field)
        if size <= HEAD_LIST_BYTES:
            found.append(field)
        size += ENTRY_BYTES + len(field[0]) + len(field[1])
        if size > DECODED_BYTES:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"a head of over {DECODED_BYTES} bytes")
    return found, size


def _longer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """An integer that does not fit its first byte, of which there is `value` (5.1); and the offset
    after it."""
    for shift in range(0, _MOST_SHIFT + 1, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer that is too long")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """A string (5.2), and the offset after it."""
    first = block[at]
    at += 1
    length = first & 0x7F
    if length == 0x7F:
        length, at = _longer(block, at, length)
    end = at + length
    if end > len(block):
        raise ValueError("a string that is cut short")
    raw = block[at:end]
    return (huffman.decode(raw) if first >= 0x80 else raw), end
