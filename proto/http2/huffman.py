"""Huffman's code of header compression (RFC 7541, 5.2 and appendix B), a byte of it in one step.

What the bits so far lead to is the prefix of some code. Each prefix has a row: for each byte that
may follow, the symbols that it completes and the row of the prefix after it. 65,792 of these steps
are made on import, in some 5 MB.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

Row: TypeAlias = list[Any]

EOS = 256  # the symbol that no string may have
ENDS = 256  # the place in a row
MOST_PADDING = 7  # bits, all ones


class Wrong(ValueError):
    """What is no code, or ends in what is no padding."""


def _prefixes() -> tuple[dict[str, int], dict[str, int]]:
    """The symbol of each code, and a number for each prefix of one, in order; both by their bits as
    text."""
    codes = {
        format(code, f"0{length}b"): symbol
        for symbol, (code, length) in enumerate(zip(REQUEST_CODES, REQUEST_CODES_LENGTH))
    }
    prefixes = {bits[:length] for bits in codes for length in range(len(bits))}
    return codes, {bits: number for number, bits in enumerate(sorted(prefixes))}


def _rows() -> Row:
    """The row of the empty prefix. Its place 256 says whether a string may end there; the others,
    by byte, what the byte completes and the row after it."""
    codes, numbers = _prefixes()
    wrong = len(numbers)

    def walked(prefix: str, nibble: str) -> tuple[bytes, int]:
        found = b""
        for bit in nibble:
            prefix += bit
            if (symbol := codes.get(prefix)) is not None:
                if symbol == EOS:
                    return b"", wrong
                found, prefix = found + bytes((symbol,)), ""
        return found, numbers[prefix]

    half = [[walked(prefix, format(n, "04b")) for n in range(16)] for prefix in numbers]
    half.append([(b"", wrong)] * 16)
    rows: list[Row] = [[] for _ in half]
    for row, first in zip(rows, half):
        row += [(high + low, rows[last]) for high, middle in first for low, last in half[middle]]
    ends = {numbers[prefix] for prefix in numbers if prefix in "1" * MOST_PADDING}
    for number, row in enumerate(rows):
        row.append(number in ends)
    return rows[0]


_FIRST = _rows()


def decode(data: bytes) -> bytes:
    """The string. Raises Wrong."""
    row, found = _FIRST, []
    for byte in data:
        piece, row = row[byte]
        found.append(piece)
    if not row[ENDS]:
        raise Wrong("not Huffman's code, or not padded as it is to be")
    return b"".join(found)
