"""GPT-2's spelling of bytes as printable characters, undone. Radford et al. 2019, released code."""

from __future__ import annotations


def _alphabet() -> dict[str, int]:
    """Printable Latin-1 characters spell themselves; the other bytes come from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


BYTE_OF = _alphabet()


def token_bytes(token: str) -> bytes:
    """A vocabulary entry as the bytes it stands for; one not spelled in the alphabet is itself."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
