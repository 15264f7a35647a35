"""Token ids to text, a few at a time: whole characters only, stop strings found and cut off."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream

from crossdock.engine.text.byte_level import token_bytes
from crossdock.engine.text.model import TextModel


@dataclass(frozen=True)
class TextDelta:
    """What some tokens added. Once `stopped` is set, nothing follows."""

    text: str
    stopped: str | None = None  # the stop string that ended it
    token_count: int = 0  # tokens of this push that count: all, or those up to the stop string


class IncrementalDetokenizer:
    """Joined, its deltas are the decoded text, cut before the first stop string.

    Held back are only the bytes of an unfinished character and text that may begin a stop string.
    """

    def __init__(
        self,
        text_model: TextModel,
        prompt_ids: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._model = text_model
        self._stop = stop
        self._skipped = text_model.special_ids if skip_special_tokens else frozenset()
        self._held = ""
        self._stopped = False
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = (
            None
            if text_model.byte_level
            else DecodeStream(ids=list(prompt_ids), skip_special_tokens=skip_special_tokens)
        )

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """The text that these tokens complete."""
        ready = []
        for count, token_id in enumerate(token_ids, 1):
            if self._stopped:
                break
            text, stopped = self._release(self._text_of(token_id))
            ready.append(text)
            if stopped is not None:
                self._stopped = True
                return TextDelta("".join(ready), stopped, count)
        return TextDelta("".join(ready), None, 0 if self._stopped else len(token_ids))

    def finish(self) -> str:
        """What was still held back, once no more tokens come."""
        if self._stopped:
            return ""
        rest = self._held + ("" if self._stream else self._bytes.decode(b"", final=True))
        self._held, self._stopped = "", True
        return rest

    def _text_of(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if self._stream is not None:
            return self._stream.step(self._model.tokenizer, token_id) or ""
        return self._bytes.decode(token_bytes(self._model.token(token_id)))

    def _release(self, text: str) -> tuple[str, str | None]:
        """What of the held text and `text` can go out, and the stop string if one is whole."""
        if not self._stop:
            return text, None
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            return self._held[:at], stop
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, None


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
