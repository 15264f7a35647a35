"""How OpenAI's completions name tokens, and where they begin."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from crossdock.model.text import TextModel
from crossdock.proto.v1 import inference_pb2

MOST_BEFORE = 4  # tokens that a character may have begun in


class Offsets:
    """Where the tokens of one text begin in what they spell: of a character that several make up,
    each where that begins. `before`: the last tokens of what they go on from, which may have ended
    inside a character."""

    def __init__(self, names: TextModel, start: int, before: Sequence[int] = ()) -> None:
        self._names, self._at = names, start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in before:
            self._take(token_id)

    def next(self, token_id: int) -> tuple[int, str]:
        """The offset of the next token, in characters, and what it adds to the text."""
        at, gained = self._at, self._take(token_id)
        self._at += len(gained)
        return at, gained

    def rest(self) -> str:
        """What is left of a character at the end."""
        return self._utf8.decode(b"", final=True)

    def _take(self, token_id: int) -> str:
        return self._utf8.decode(self._names.pieces.of(token_id, skip_special=True))


def top_by_name(names: TextModel, item: inference_pb2.TokenLogprobs, top: int) -> dict[str, float]:
    """The `top` most probable tokens, and the one that is there, by name; where two have one, the
    less probable goes by its bytes, or its id."""
    named: dict[str, float] = {}
    entries = list(item.top[:top])
    if all(entry.token_id != item.chosen.token_id for entry in entries):
        entries.append(item.chosen)
    for entry in entries:
        id_ = entry.token_id
        known = token_name(names, id_), bytes_name(names, id_), f"token_id:{id_}"
        named[next((name for name in known if name not in named), known[-1])] = entry.logprob
    return named


def token_name(names: TextModel, token_id: int) -> str:
    """A token as OpenAI's completions name it: by its text, where that is whole characters."""
    try:
        return names.token_bytes(token_id).decode("utf-8")
    except UnicodeDecodeError:
        return bytes_name(names, token_id)


def bytes_name(names: TextModel, token_id: int) -> str:
    """A token by its bytes: "bytes:", then each as \\x and two digits."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in names.token_bytes(token_id))
