"""The default model under schemas and tools: what it ends matches."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from offline import LLM
from schemas import random_schema

from crossdock.proto.types import FinishReason, Grammar, GrammarKind, SamplingParams
from crossdock.router.frontdoor.tools.calls import CallArguments, CallBegun
from crossdock.router.frontdoor.tools.conversation import Conversation
from crossdock.router.frontdoor.tools.formats import format_of
from crossdock.router.frontdoor.tools.offer import offer_of

COUNT = 24
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(str(smollm2), num_blocks=600, threads=1)


def test_every_finished_answer_validates(llm: LLM) -> None:
    schemas = [random_schema(1000 + seed, depth=2) for seed in range(COUNT)]
    asked = [
        SamplingParams(
            temperature=0.0 if seed % 2 else 1.0,
            seed=seed,
            max_tokens=120,
            grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)),
        )
        for seed, schema in enumerate(schemas)
    ]
    answers = llm.generate(["Describe something as JSON."] * COUNT, asked, chat=True)
    finished = 0
    for schema, answer in zip(schemas, answers):
        if answer.finish_reason is FinishReason.STOP:
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
            finished += 1
    assert finished > COUNT * 0.8


def test_it_calls_a_tool(llm: LLM) -> None:
    offer = offer_of([TOOL], "required", False)
    how = format_of("auto", llm.text)
    asked = [{"role": "user", "content": "What is the weather in Paris today?"}]
    messages, prompted, more = Conversation(asked, offer).rendered(llm.text, how)
    prompt = llm.text.apply_chat_template(messages, prompted, more)
    params = SamplingParams(temperature=0.0, max_tokens=80, grammar=how.grammar(offer, llm.text))
    [answer] = llm.generate([prompt], params)
    assert answer.finish_reason is FinishReason.STOP
    begun, arguments, *_ = how.parser(offer).push(answer.text)
    assert begun == CallBegun(0, "get_weather")
    assert isinstance(arguments, CallArguments)
    assert json.loads(arguments.text) == {"city": "Paris"}
