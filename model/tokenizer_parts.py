"""What a tokenizer reader finds in a model's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer, processors

# One text at a time is all that is ever encoded: the library's pool of threads would only add
# wake-ups to it, and a thread for each core to every process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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


def ids_of(tokenizer: Tokenizer, text: str, *, framed: bool = True) -> list[int]:
    """Token ids of a text, with what the tokenizer puts around one where it is `framed`. Quicker
    than `encode`, which works out as well where in the text each token begins."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=framed)[0].ids
