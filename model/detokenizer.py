"""Token ids to text as they are generated. Imports no torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from crossdock.model.text import TextModel


_Utf8 = codecs.getincrementaldecoder("utf-8")


class TextDelta(NamedTuple):
    """What a push added to the text."""

    text: str
    stopped: str | None  # the stop string that was reached; it and what follows are cut off
    token_count: int  # tokens taken: up to the one that completed the stop string, else all


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text, at a cost that does not grow with its length.

    Bytes of an unfinished character are held back, and so is text that may begin a stop string.
    The deltas and `finish()` joined are the whole text, cut before the stop string that was
    completed first (of those completed at once, the one that began first), however the tokens
    were grouped.
    """

    def __init__(
        self,
        text_model: TextModel,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._pieces = text_model.pieces
        self._skip_special = skip_special_tokens
        self._utf8 = _Utf8("replace")
        self._strip_space = self._pieces.strips_first_space and not prompt_ids
        self._stop = tuple(stop)
        self._firsts = {text[0] for text in self._stop}
        self._longest = max(map(len, self._stop), default=0)
        self._shown: frozenset[int] = frozenset()
        self._held = ""  # text that is the beginning of a stop string
        self._stopped: str | None = None
        self._settled = False  # a token's text depends on nothing before it
        self._ascii = self._pieces.ascii if skip_special_tokens else {}
        # A prompt may end inside a character, whose rest is then generated.
        last = self._pieces.of(prompt_ids[-1], self._skip_special) if prompt_ids else b"."
        if not last or not last.isascii():
            tail = b"".join(self._pieces.of(id_, self._skip_special) for id_ in prompt_ids[-4:])
            self._utf8.decode(tail)

    def show(self, token_ids: frozenset[int]) -> None:
        """These have text from now on, though they are special tokens."""
        self._shown, self._ascii = token_ids, {}

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of a push, where no stop string is looked for."""
        if self._settled and len(token_ids) == 1:
            text = self._ascii.get(token_ids[0])  # the most of what is ever pushed
            if text is not None:
                return text
        return self.push(token_ids).text

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """The text that these tokens settle. After a stop string everything is dropped."""
        if self._settled and len(token_ids) == 1 and token_ids[0] not in self._shown:
            raw = self._pieces.of(token_ids[0], self._skip_special)
            if raw.isascii():
                text = self._ascii[token_ids[0]] = raw.decode("ascii")
                return TextDelta(text, None, 1)
        if self._stopped is not None:
            return TextDelta("", self._stopped, 0)
        said: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            skip = self._skip_special and token_id not in self._shown
            said.append(self._take(self._pieces.of(token_id, skip), final=False))
            if self._stopped is not None:
                return TextDelta("".join(said), self._stopped, count)
        return TextDelta("".join(said), None, len(token_ids))

    def finish(self) -> str:
        """What was held back. Bytes that never became a character are U+FFFD."""
        if self._stopped is not None:
            return ""
        text = self._take(b"", final=True)
        if self._stopped is None:
            text += self._held
            self._held = ""
        return text

    def _take(self, raw: bytes, final: bool) -> str:
        new = self._utf8.decode(raw, final)
        self._settled = not (self._stop or self._strip_space or self._utf8.getstate()[0])
        if self._strip_space and new:
            new = new.removeprefix(" ")
            self._strip_space = False
        if not self._stop or not new:
            return new
        text = self._held + new
        found = self._first_stop(text)
        if found is not None:
            start, self._stopped = found
            return text[:start]
        keep = self._begins_stop_at(text)
        self._held = text[keep:]
        return text[:keep]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _begins_stop_at(self, text: str) -> int:
        """Where the longest end of `text` starts that is the beginning of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts:
                tail = text[at:]
                if any(stop.startswith(tail) for stop in self._stop):
                    return at
        return len(text)
