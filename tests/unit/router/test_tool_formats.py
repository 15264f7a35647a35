"""Grammars of answers that must be calls: what they allow is what the format's parser reads."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tiny import make_tiny_model
from tokenizers import AddedToken, Tokenizer

from crossdock.model.grammar import GrammarCompiler
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind
from crossdock.router.frontdoor.tools.calls import CallArguments, CallBegun, Content
from crossdock.router.frontdoor.tools.chat import form
from crossdock.router.frontdoor.tools.formats import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    NONE,
    ToolFormat,
    format_of,
)
from crossdock.router.frontdoor.tools.offer import Offer, offer_of

SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "properties": {"city": {"enum": ["Köln", 'a "b"']}, "n": {"$ref": "#/$defs/n"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    },
    "get_time": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """A tokenizer whose markers of calls are special tokens."""
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("marked"), vocab_size=400)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_text(resolve(str(folder)))


def write(
    text: TextModel, how: ToolFormat, offer: Offer, seed: int, instead: Grammar | None = None
) -> str:
    matcher = GrammarCompiler(text).matcher(how.grammar(offer, text, instead))
    rng, drawn = random.Random(seed), []
    for _ in range(2000):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        token_id = int(rng.choice(np.flatnonzero(bits)))
        if token_id in text.eos_token_ids:
            return text.decode(drawn, skip_special_tokens=False)
        drawn.append(token_id)
        assert matcher.consume_token(token_id), matcher.get_error()
    raise AssertionError("it did not end")


@pytest.mark.parametrize("how", [HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS])
@pytest.mark.parametrize("parallel", [True, False])
def test_what_the_grammar_allows_the_parser_reads(
    text: TextModel, how: ToolFormat, parallel: bool
) -> None:
    offer, counts = offer_of(TOOLS, "required", parallel), set()
    for seed in range(12):
        parser = how.parser(offer)
        written = write(text, how, offer, seed)
        events = [*parser.push(written), *parser.finish()]
        assert not [event for event in events if isinstance(event, Content)], written
        names = [event.name for event in events if isinstance(event, CallBegun)]
        for i, name in enumerate(names):
            parts = (e.text for e in events if isinstance(e, CallArguments) and e.index == i)
            jsonschema.validate(json.loads("".join(parts)), SCHEMAS[name])
        counts.add(len(names))
    assert min(counts) == 1
    assert (max(counts) > 1) is (parallel and how.several)


def test_a_form_of_the_answer_beside_calls_that_cannot_be_told_from_it(text: TextModel) -> None:
    offer, schema = offer_of(TOOLS, None, None), Grammar(GrammarKind.JSON_OBJECT)
    lark = Grammar(GrammarKind.LARK, 'start: "a"')
    for how, asked in ((LLAMA3_JSON, schema), (HERMES, lark)):
        with pytest.raises(InvalidRequest, match=r"^x: .*together with tools"):
            form(("x", asked), offer, text, how)
    assert form(("x", schema), offer_of(TOOLS, "none", None), text, LLAMA3_JSON) == ("x", schema)
    required = form(("x", lark), offer_of(TOOLS, "required", None), text, HERMES)
    assert required is not None and required[0] == "tools", "no text that could have a form"


@pytest.mark.parametrize("how", [HERMES, MISTRAL, MISTRAL_ARGS])
@pytest.mark.parametrize("kind", [GrammarKind.JSON_SCHEMA, GrammarKind.REGEX, GrammarKind.CHOICE])
def test_an_answer_is_calls_or_has_the_form_that_was_asked_for(
    text: TextModel, how: ToolFormat, kind: GrammarKind
) -> None:
    answers = {
        GrammarKind.JSON_SCHEMA: '{"enum": [17, {"a": "b"}]}',
        GrammarKind.REGEX: r"[xyz]/[0-9]",
        GrammarKind.CHOICE: '["yes", "no \\""]',
    }
    fits = {
        GrammarKind.JSON_SCHEMA: lambda said: json.loads(said) in (17, {"a": "b"}),
        GrammarKind.REGEX: re.compile(r"[xyz]/[0-9]").fullmatch,
        GrammarKind.CHOICE: ["yes", 'no "'].__contains__,
    }
    offer, calls = offer_of(TOOLS, None, None), set()
    for seed in range(16):
        parser = how.parser(offer)
        written = write(text, how, offer, seed, Grammar(kind, answers[kind]))
        events = [*parser.push(written), *parser.finish()]
        said = "".join(event.text for event in events if isinstance(event, Content))
        assert not said if parser.calls else fits[kind](said), written
        calls.add(bool(parser.calls))
    assert calls == {True, False}, "either, as it is drawn"


def test_a_named_tool_is_called_once(text: TextModel) -> None:
    choice = {"type": "function", "function": {"name": "get_time"}}
    offer = offer_of(TOOLS, choice, None)
    for seed in range(5):
        parser = HERMES.parser(offer)
        begun, arguments = parser.push(write(text, HERMES, offer, seed))
        assert begun == CallBegun(0, "get_time")
        assert isinstance(arguments, CallArguments)
        assert json.loads(arguments.text) == {}


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ '<tool_call>' }}{{ tools }}", HERMES),
        ("{{ '[TOOL_CALLS]' }}{{ tools }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' }}{{ name }}{{ '[ARGS]' }}", MISTRAL_ARGS),
        ("{{ '<|python_tag|>' }}", LLAMA3_JSON),
        ("{{ messages }}", HERMES),
    ],
)
def test_the_format_is_the_templates(tmp_path: Path, template: str, found: ToolFormat) -> None:
    folder = make_tiny_model(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    model = load_text(resolve(str(folder)))
    assert format_of("auto", model) is found
    assert format_of("none", model) is NONE
