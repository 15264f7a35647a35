"""Text to token ids and back for one model. Imports no torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from crossdock.model.byte_tokenizer import byte_tokenizer
from crossdock.model.chat_template import ChatTemplate
from crossdock.model.config import load_limits
from crossdock.model.hf_tokenizer import read_hf_tokenizer
from crossdock.model.plain_text import PlainText
from crossdock.model.store import ModelFiles
from crossdock.model.token_bytes import TokenBytes
from crossdock.model.tokenizer_parts import ids_of
from crossdock.proto.errors import InvalidRequest

NOTHING: Mapping[str, Any] = MappingProxyType({})
_ANSWER = "\U000f0002"  # of private use: stands for an answer of which only the tokens are known


@dataclass(frozen=True)
class TextModel:
    """A model's tokenizer and chat template. Safe to share between threads.

    vocab_size is the model's: the tokenizer may know fewer ids (the rest have no text).
    """

    tokenizer: Tokenizer
    pieces: TokenBytes
    template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    vocab_size: int
    context_length: int  # tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt, with BOS or whatever else the tokenizer puts around a text."""
        return ids_of(self.tokenizer, text)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        raw = b"".join(self.pieces.of(id_, skip_special_tokens) for id_ in token_ids)
        text = raw.decode("utf-8", "replace")
        return text[1:] if self.pieces.strips_first_space and text.startswith(" ") else text

    def starts(self, text: str, token_ids: Sequence[int]) -> list[int]:
        """Where each of these tokens begins in the text that `encode` made them of, in characters:
        of a character that several make up, each where that begins; of what stands around the text,
        at its ends. Empty where they are not that text's."""
        encoding = self._without_frame.encode(text)
        inner, count = encoding.ids, len(encoding.ids)
        for before in range(len(token_ids) - count + 1):
            if list(token_ids[before : before + count]) == inner:
                after = len(token_ids) - before - count
                starts = [start for start, _ in encoding.offsets]
                return [0] * before + starts + [len(text)] * after
        return []

    @cached_property
    def _without_frame(self) -> Tokenizer:
        """The tokenizer, which puts nothing around a text and leaves blanks to their tokens."""
        told = json.loads(self.tokenizer.to_str())
        return Tokenizer.from_str(json.dumps(told | {"post_processor": None}))

    def token_text(self, token_id: int) -> str:
        """Text of one id as logprobs show it, special tokens included."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one id; a character may be spread over several ids."""
        return self.pieces.of(token_id, skip_special=False)

    def ids_of(self, tokens: Iterable[str]) -> frozenset[int]:
        """Ids of those of these tokens that the vocabulary has."""
        found = (self.tokenizer.token_to_id(token) for token in tokens)
        return frozenset(token_id for token_id in found if token_id is not None)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        more: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        """Ids of the prompt; the template writes BOS itself where the model wants it, and nothing
        that is spelled like a special token in `messages` or `more` (other fields of Rendering)
        becomes one. Raises InvalidRequest where the template does not accept `messages`, or the
        model has none."""
        if self.template is None:
            limit = "this model has no chat template: send a prompt instead"
            raise InvalidRequest("messages", f"{len(messages)} messages", limit)
        plain = self._plain_text
        marked = plain.marked([dict(message) for message in messages])
        text = self.template.render(marked, add_generation_prompt, **plain.marked(more))
        return plain.encode(text)

    def next_turn(
        self,
        before: Sequence[Mapping[str, Any]],
        after: Sequence[Mapping[str, Any]],
        more: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        """Ids of what the template writes after the assistant's answer to `before` where `after`
        follows it: the end of that turn, `after`, and the beginning of the next answer. So prompt,
        answer and these make the next prompt, whatever tokens the answer was made of. Empty where
        the template does not only add: what it writes before the answer is not that prompt."""
        if self.template is None:
            return []
        plain = self._plain_text
        asked, told = ([plain.marked(dict(each)) for each in part] for part in (before, after))
        options, answer = plain.marked(more), {"role": "assistant", "content": _ANSWER}
        try:
            prompt = self.template.render(asked, **options)
            text = self.template.render([*asked, answer, *told], **options)
        except InvalidRequest:
            return []
        head, _, rest = text.partition(_ANSWER)
        return plain.encode(rest) if head == prompt and rest and _ANSWER not in rest else []

    @cached_property
    def _plain_text(self) -> PlainText:
        return PlainText(self.tokenizer)


@functools.lru_cache(maxsize=4)
def load_text(files: ModelFiles) -> TextModel:
    """Reads tokenizer and chat template. Raises ModelError naming what is missing or wrong."""
    limits = load_limits(files)
    if files.format == "bytes":
        parts = byte_tokenizer()
    elif files.format == "gguf":
        from crossdock.model.gguf_tokenizer import read_gguf_tokenizer  # which loads much

        parts = read_gguf_tokenizer(files.path)
    else:
        parts = read_hf_tokenizer(files.path)
    template = ChatTemplate(parts.template, parts.special, str(files.path))
    eos = set(limits.eos_token_ids)
    if (eos_id := parts.tokenizer.token_to_id(parts.special.get("eos_token", ""))) is not None:
        eos.add(eos_id)
    return TextModel(
        tokenizer=parts.tokenizer,
        pieces=TokenBytes(parts.tokenizer, str(files.path)),
        template=template if parts.template else None,
        eos_token_ids=frozenset(eos),
        vocab_size=limits.vocab_size,
        context_length=limits.context_length,
    )
