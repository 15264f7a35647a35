"""What a client wrote stays text: it never becomes a special token. Imports no torch.

Templates mix what their makers wrote, special tokens included, with what a client did. Before a
conversation is rendered, each place in the client's texts that is spelled like a special token gets
a mark; after it, special tokens are looked for in between the marks alone, and the marks are gone.
A conversation without such places is rendered and tokenized as it always was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar, cast

from tokenizers import Tokenizer

from crossdock.model.tokenizer_parts import ids_of

MARK = "\ue0f0"  # of private use

T = TypeVar("T")


class PlainText:
    """Marks clients' texts, and tokenizes rendered ones that hold marks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {
            token.content: token_id for token_id, token in added if token.special and token.content
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        beginnings = {token[:end] for token in self._special for end in range(1, len(token))}
        self._beginnings = tuple(sorted(beginnings))

    def marked(self, value: T) -> T:
        """The value, its texts marked wherever they are: in lists and under keys too."""
        found: Any = value
        if isinstance(value, str):
            found = value.replace(MARK, MARK * 2)  # the client's own
            found = self._any.sub(lambda match: match[0][0] + MARK + match[0][1:], found)
            if value.endswith(self._beginnings):  # what the template writes next may complete it
                found += MARK
        elif isinstance(value, Mapping):
            found = {self.marked(key): self.marked(entry) for key, entry in value.items()}
        elif isinstance(value, list | tuple):
            found = type(value)(self.marked(entry) for entry in value)
        return cast(T, found)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text; what holds marks is no special token."""
        if MARK not in text:
            return ids_of(self._tokenizer, text, framed=False)
        ids: list[int] = []
        at = 0
        for match in self._any.finditer(text):
            ids += self._as_text(text[at : match.start()])
            ids.append(self._special[match[0]])
            at = match.end()
        return ids + self._as_text(text[at:])

    def _as_text(self, text: str) -> list[int]:
        plain = MARK.join(part.replace(MARK, "") for part in text.split(MARK * 2))
        return ids_of(self._without_special, plain, framed=False) if plain else []

    @cached_property
    def _without_special(self) -> Tokenizer:
        """The tokenizer, to which a special token is the text that it is spelled like."""
        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy
