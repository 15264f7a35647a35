"""Grammars compiled for a model's tokens."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tiny import make_tiny_model

from crossdock.model.grammar import GrammarCompiler
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind

K = GrammarKind


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextModel:
    return load_text(resolve(str(make_tiny_model(tmp_path_factory.mktemp("grammar")))))


@pytest.fixture(scope="module")
def compiler(text) -> GrammarCompiler:
    return GrammarCompiler(text)


def allowed(matcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def write(compiler, text, grammar: Grammar, seed: int = 0, most: int = 400) -> str | None:
    """What random draws of what is allowed come to; None where they do not end."""
    matcher, rng, drawn = compiler.matcher(grammar), random.Random(seed), []
    for _ in range(most):
        token_id = rng.choice(allowed(matcher))
        if token_id in text.eos_token_ids:
            return text.decode(drawn)
        drawn.append(token_id)
        assert matcher.consume_token(token_id), matcher.get_error()
    return None


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar(K.CHOICE, '["yes","n\\u00f6 \\"x\\"\\n","back\\\\slash 🙂"]'),
         {"yes", 'nö "x"\n', "back\\slash 🙂"}),
        (Grammar(K.REGEX, "a/b|[0-1]{2}"), {"a/b", "00", "01", "10", "11"}),
        (Grammar(K.REGEX, "^a\nb$"), {"a\nb"}),
        (Grammar(K.LARK, 'start: "x" NUMBER\nNUMBER: /[12]/  // one of two'), {"x1", "x2"}),
        (Grammar(K.JSON_SCHEMA, '{"type":"integer","minimum":3,"maximum":4}'), {"3", "4"}),
        (Grammar(K.JSON_SCHEMA, '{"enum":["ä",null]}'), {'"ä"', "null"}),
        (Grammar(K.LARK, 'start: "<|im_end|>"'), {"<|im_end|>"}),
    ],
)  # fmt: skip
def test_what_is_written_matches_and_nothing_else_is(compiler, text, grammar, texts):
    assert {write(compiler, text, grammar, seed) for seed in range(40)} == texts


def test_a_json_object_is_one(compiler, text):
    written = [write(compiler, text, Grammar(K.JSON_OBJECT), seed) for seed in range(30)]
    finished = [each for each in written if each is not None]
    assert len(finished) > 3
    assert all(isinstance(json.loads(each), dict) for each in finished)


def test_special_tokens_are_never_text(compiler, text):
    matcher = compiler.matcher(Grammar(K.REGEX, r"(.|\n)*"))
    special = {text.tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_start|>")}
    assert special.isdisjoint(allowed(matcher))
    assert text.eos_token_ids <= set(allowed(matcher))  # the empty text matches


def test_the_end_is_allowed_only_where_the_grammar_is_complete(compiler, text):
    matcher = compiler.matcher(Grammar(K.REGEX, "ab"))
    for piece in "ab":
        assert text.eos_token_ids.isdisjoint(allowed(matcher))
        matcher.consume_token(text.encode(piece)[0])
    assert set(allowed(matcher)) == text.eos_token_ids


def test_blanks_between_the_parts_of_json_are_bounded(compiler, text):
    schema = '{"type":"object","properties":{"a":{"type":"null"}},"required":["a"]}'
    matcher = compiler.matcher(Grammar(K.JSON_SCHEMA, schema))
    matcher.consume_tokens(text.encode("{\n"))
    blank = text.encode(" ")[0]
    count = 0
    while blank in allowed(matcher):
        matcher.consume_token(blank)
        count += 1
    assert count == 32


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar(K.REGEX, "(a"), "unclosed group"),
        (Grammar(K.REGEX, "(?=a)b"), "look"),
        (Grammar(K.REGEX, 'a/\n%llguidance {"no_forcing":false}\nfoo: /('), "repetition"),
        (Grammar(K.LARK, "start: foo"), 'unknown name: "foo"'),
        (Grammar(K.LARK, "start"), "Expected"),
        (Grammar(K.LARK, "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
        (Grammar(K.JSON_SCHEMA, "{"), "must be JSON"),
        (Grammar(K.JSON_SCHEMA, "[]"), "must be an object"),
        (Grammar(K.JSON_SCHEMA, "[" * 60_000), "must be JSON"),
        (Grammar(K.JSON_SCHEMA, '{"type":"strin"}'), "Invalid type: strin"),
        (Grammar(K.JSON_SCHEMA, '{"$ref":"http://example.com/x"}'), "http://example.com/x"),
        (Grammar(K.JSON_SCHEMA, '{"not":{}}'), "not"),
        (Grammar(K.JSON_SCHEMA, '{"x-guidance":{"whitespace_pattern":"("}}'), "unclosed group"),
        (Grammar(K.CHOICE, '["a", 1]'), "texts"),
        (Grammar(K.CHOICE, "[]"), "texts"),
        (Grammar(K.CHOICE, '"a"'), "texts"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(compiler, grammar, why):
    with pytest.raises(InvalidRequest) as refused:
        compiler.matcher(grammar)
    assert refused.value.field == "grammar"
    assert why in refused.value.limit
    assert "\n" not in refused.value.limit


def test_matchers_of_one_grammar_share_nothing_but_its_compilation(compiler, text):
    grammar = Grammar(K.REGEX, "[ab]c")
    one, other = compiler.matcher(grammar), compiler.matcher(grammar)
    one.consume_token(text.encode("a")[0])
    assert allowed(one) != allowed(other)
    assert allowed(compiler.matcher(grammar)) == allowed(other)
