"""What an answer must match, compiled for one model's tokens by llguidance. Imports no torch."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from crossdock.model.text import TextModel
from crossdock.model.tokenizer_parts import ids_of
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind

# One space, or a new line and what a level is indented by: what a model that was left to itself
# writes, but not the endless blanks that a small one falls into.
WHITESPACE = r" |\n {0,32}"

# A mask is what the grammar allows and nothing less: without "forcing", tokens that spell what must
# come in another way than the tokenizer would are allowed too, so that the state of a grammar is a
# function of the tokens that were drawn.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

_PREFIX = re.compile(r"error: |at \d+\(\d+\): (failed to compile JSON schema: )?")

MAX_CHOICES = 1000
MAX_CACHED = 64  # compiled grammars


def limits() -> LLParserLimits:
    """Of one grammar: a mask takes some 20 ms at the most, what is kept of it some 40 MB."""
    return LLParserLimits(
        step_max_items=20_000, max_lexer_states=20_000, max_grammar_size=100_000,
        verbose_errors=False,
    )  # fmt: skip


class GrammarCompiler:
    """Compiles grammars for the tokens of one model. Safe to share between threads.

    The tokenizer is built with the first grammar: some 0.2 s for 50,000 tokens, 1 s for 150,000.
    """

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self._building, self._cache = threading.Lock(), threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # the last used last

    @property
    def tokenizer(self) -> LLTokenizer:
        """The model's tokens as llguidance knows them."""
        with self._building:
            return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(
            TokenizerWrapper(_Tokens(self._text)), eos_token=sorted(self._text.eos_token_ids)
        )

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of an answer. Raises InvalidRequest for the field "grammar"
        where it is none, or beyond the limits."""
        with self._cache:
            compiled = self._compiled.get(grammar)
        compiled = compiled or self._compile(grammar)
        with self._cache:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if not self._text.eos_token_ids:
            limit = "this model has no token that ends an answer"
            raise InvalidRequest("grammar", grammar.kind, limit)
        matcher = LLMatcher(self.tokenizer, lark_of(grammar), limits=limits(), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some of what is wrong is found by the first step alone
        if matcher.is_error():
            raise refusal(grammar, matcher.get_error())
        return matcher


def lark_of(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises InvalidRequest for the field "grammar"."""
    if grammar.kind is GrammarKind.LARK:
        return grammar.text + _OPTIONS
    return f"start: {rule_of(grammar)}{_OPTIONS}"


def rule_of(grammar: Grammar) -> str:
    """What stands behind a rule's name to describe the same in Lark, with what it needs on further
    lines. Raises InvalidRequest for the field "grammar", as for one that is Lark itself."""
    if grammar.kind is GrammarKind.LARK:
        raise InvalidRequest("grammar", grammar.kind, "cannot be a part of another grammar")
    if grammar.kind is GrammarKind.REGEX:
        return f"/{regex_to_lark(grammar.text, '')}/"
    if grammar.kind is GrammarKind.CHOICE:
        texts = (json.dumps(text, ensure_ascii=False) for text in choices_of(grammar))
        return f"CHOICE\nCHOICE: {' | '.join(texts)}"
    return f"%json {json.dumps(_schema_of(grammar))}"


def choices_of(grammar: Grammar) -> list[str]:
    """The texts of a choice. Raises InvalidRequest for the field "grammar"."""
    found = _json_of(grammar)
    good = isinstance(found, list) and all(isinstance(each, str) and each for each in found)
    if not good or not 1 <= len(found) <= MAX_CHOICES:
        limit = f"must be a list of 1 to {MAX_CHOICES} texts, none of them empty"
        raise InvalidRequest("grammar", grammar.text, limit)
    return found


def refusal(grammar: Grammar, why: str) -> InvalidRequest:
    """Why llguidance does not take a grammar, in one line: the line of an error where there is one,
    and a place in the text only where the text is the client's own."""
    lines = [line.strip() for line in why.splitlines()]
    found = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    if grammar.kind is not GrammarKind.LARK:
        found = _PREFIX.sub("", found)
    return InvalidRequest("grammar", grammar.text, f"cannot be used as {grammar.kind}: {found}")


def _schema_of(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind is GrammarKind.JSON_OBJECT:
        schema: Any = {"type": "object"}
    else:
        schema = _json_of(grammar)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequest("grammar", grammar.text, "a JSON schema must be an object")
    own = schema.get("x-guidance")
    defaults = {"whitespace_pattern": WHITESPACE}
    return schema | {"x-guidance": defaults | (own if isinstance(own, dict) else {})}


def _json_of(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("grammar", grammar.text, f"must be JSON: {error}") from None


class _Tokens:
    """What llguidance asks of a tokenizer; its names."""

    bos_token_id = None

    def __init__(self, text: TextModel) -> None:
        self._tokenizer = text.tokenizer
        self.eos_token_id = min(text.eos_token_ids)
        self.tokens = [text.token_bytes(token_id) for token_id in range(text.vocab_size)]
        never_text = text.pieces.special_ids | text.eos_token_ids | _unknown(text)
        self.special_token_ids = sorted(each for each in never_text if each < text.vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return ids_of(self._tokenizer, plain, framed=False)


def _unknown(text: TextModel) -> set[int]:
    """The token that a tokenizer puts for what it cannot spell."""
    name = getattr(text.tokenizer.model, "unk_token", None)
    found = text.tokenizer.token_to_id(name) if name else None
    return set() if found is None else {found}
