"""The bytes that each token id stands for. Imports no torch.

Two spellings cover the families served here: byte-level BPE, where each byte is one visible
character (GPT-2), and SentencePiece BPE, where U+2581 is a space and <0x0A> is a byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tokenizers import Tokenizer

from crossdock.proto.errors import ModelError

_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 stands for itself, the other bytes follow U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


class TokenBytes:
    """Token id -> bytes, worked out once an id."""

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        told = tokenizer.to_str()
        self.digest = hashlib.sha256(told.encode()).digest()  # equal where the tokenizers are
        kinds = _decoder_parts(json.loads(told)["decoder"])
        names = {part["type"] for part in kinds}
        self._byte_level = "ByteLevel" in names
        if not self._byte_level and not names & {"ByteFallback", "Metaspace"}:
            shown = ", ".join(sorted(names)) or "none"
            raise ModelError(f"{where}: the tokenizer's decoder ({shown}) is not supported")
        self.strips_first_space = not self._byte_level and any(map(_strips, kinds))
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id_ for id_, token in self._added.items() if token.special)
        self._tokenizer = tokenizer
        self._alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = {}
        self.ascii: dict[int, str] = {}  # of ids whose text is ASCII wherever it stands, once seen

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: what they are spelled like is no text."""
        return self._special

    def of(self, token_id: int, skip_special: bool) -> bytes:
        """The token's bytes, empty for a special one that is skipped; looked up once each."""
        if skip_special and token_id in self._special:
            return b""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.content.encode("utf-8", "replace")
        piece = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if self._byte_level:
            try:
                return bytes([self._alphabet[character] for character in piece])
            except KeyError:
                return piece.encode("utf-8", "replace")
        if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
            return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE, " ").encode("utf-8", "replace")


def _decoder_parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _decoder_parts(inner)]


def _strips(part: dict[str, Any]) -> bool:
    if part["type"] == "Strip":
        return part.get("content") == " " and part.get("start", 0) > 0
    return part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
