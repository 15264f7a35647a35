"""What OpenAI's answers say of a prompt's tokens: `echo` with `logprobs`, and `prompt_logprobs` as
vLLM gives it. A long prompt's is made in slices, between which others run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from crossdock.model.text import TextModel
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.request import Delta
from crossdock.router.dispatch.scored import ScoredPrompt
from crossdock.router.frontdoor.openai_logprobs import Offsets, token_name, top_by_name

# Where tokens begin in the text that they were made of, where they do not spell just that.
Align = Callable[[str, Sequence[int]], Awaitable[list[int]]]
SLICE_ENTRIES = 1024  # tokens and alternatives, made without letting others run
_encode = msgspec.json.encode


@dataclass
class PromptAnswers:
    """Of one request's prompts, each made once for all its continuations. `echo`: alternatives of
    an echoed prompt's tokens, `whole`: those of `prompt_logprobs`; None: not asked for."""

    names: TextModel
    n: int  # answers to each prompt
    texts: Sequence[str] = ()  # by prompt, as it is echoed
    ends: Sequence[Sequence[int]] = ()  # by prompt, its last tokens
    align: Align | None = None  # for texts
    echo: int | None = None
    whole: int | None = None
    _columns: dict[int, dict[str, list[Any]]] = field(default_factory=dict)  # by prompt
    _encoded: dict[int, msgspec.Raw] = field(default_factory=dict)

    async def prepare(self, deltas: Sequence[Delta]) -> None:
        """Makes what these are to say of their prompts."""
        for delta in deltas:
            prompt = delta.index // self.n
            if delta.prompt is None:
                continue
            if self.echo is not None and prompt not in self._columns:
                self._columns[prompt] = await self._column(prompt, delta.prompt, self.echo)
            if self.whole is not None and prompt not in self._encoded:
                self._encoded[prompt] = await self._encode(delta.prompt, self.whole)

    def columns(self, index: int) -> dict[str, list[Any]]:
        """Log-probabilities of the echoed prompt of an answer; empty where none were asked for."""
        return self._columns.get(index // self.n, {})

    def encoded(self, index: int) -> dict[str, msgspec.Raw]:
        """The field `prompt_logprobs` of an answer, where it was asked for."""
        found = self._encoded.get(index // self.n)
        return {} if found is None else {"prompt_logprobs": found}

    async def _column(self, prompt: int, scored: ScoredPrompt, top: int) -> dict[str, list[Any]]:
        names = self.names
        tokens: list[str] = [token_name(names, scored.token_ids[0])]
        logprobs: list[float | None] = [None]
        tops: list[msgspec.Raw | None] = [None]
        for place, item in enumerate(scored.tokens()):
            await _breathe(place, top)
            tokens.append(token_name(names, item.chosen.token_id))
            logprobs.append(item.chosen.logprob)
            tops.append(msgspec.Raw(_encode(top_by_name(names, item, top))))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": await self._starts(self.texts[prompt], scored.token_ids),
        }

    async def _starts(self, text: str, token_ids: Sequence[int]) -> list[int]:
        """Where the tokens of a prompt begin in the text that is echoed. A tokenizer may have put
        it into another form first, or read special tokens in it."""
        offsets, starts, spelled = Offsets(self.names, 0), list[int](), list[str]()
        for place, token_id in enumerate(token_ids):
            await _breathe(place, 0)
            at, gained = offsets.next(token_id)
            starts.append(at)
            spelled.append(gained)
        whole = "".join([*spelled, offsets.rest()])
        if whole == text:
            return starts
        if self.names.pieces.strips_first_space and whole == f" {text}":
            return [max(0, at - 1) for at in starts]
        aligned = await self.align(text, token_ids) if self.align is not None else []
        return aligned or [min(at, len(text)) for at in starts]

    async def _encode(self, scored: ScoredPrompt, top: int) -> msgspec.Raw:
        parts = [b"null"]
        for place, item in enumerate(scored.tokens()):
            await _breathe(place, top)
            told: dict[str, Any] = {}
            for entry in (item.chosen, *item.top[:top]):
                told.setdefault(str(entry.token_id), self._entry(entry))
            parts.append(_encode(told))
        return msgspec.Raw(b"[" + b",".join(parts) + b"]")

    def _entry(self, entry: inference_pb2.TokenLogprob) -> dict[str, Any]:
        text = self.names.token_text(entry.token_id)
        return {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": text}


async def _breathe(place: int, top: int) -> None:
    if place % max(1, SLICE_ENTRIES // (1 + top)) == 0:
        await asyncio.sleep(0)
