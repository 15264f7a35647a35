"""What a tokenizer reader finds in a model's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer, processors


@dataclass(frozen=True)
class TokenizerParts:
    """What a model's files say of its text: tokenizer, chat templates, special tokens."""

    tokenizer: Tokenizer
    template: Mapping[str, str] = field(default_factory=dict)  # by name; "default" is the usual one
    special: Mapping[str, str] = field(default_factory=dict)  # "bos_token", "eos_token", … -> text


def surround(tokenizer: Tokenizer, before: str | None, after: str | None) -> None:
    """Makes the tokenizer put these special tokens around a raw text."""
    tokens = [text for text in (before, after) if text is not None]
    single = [*([before] if before else []), "$A", *([after] if after else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(text, tokenizer.token_to_id(text)) for text in tokens]
    )
