"""How OpenAI's completions name tokens, and where they begin."""

from __future__ import annotations

import codecs

from crossdock.model.text import TextModel
from crossdock.proto.v1 import inference_pb2


class Offsets:
    """Where the tokens of one completion begin in its text: of a character that several make up,
    each where that begins."""

    def __init__(self, names: TextModel, start: int) -> None:
        self._names, self._at = names, start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token_id: int) -> int:
        """The offset of the next token, in characters."""
        at = self._at
        self._at += len(self._utf8.decode(self._names.pieces.of(token_id, skip_special=True)))
        return at


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
