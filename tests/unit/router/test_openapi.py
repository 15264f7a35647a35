"""The description of bodies in /openapi.json is what the door takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest
from gateway_rig import Rig
from http_kit import post

from crossdock.router.frontdoor.openai_fields import CHANGE_NOTHING, CHANGE_THE_ANSWER
from crossdock.router.frontdoor.openai_schemas import SamplingFields
from crossdock.router.frontdoor.openapi import document
from crossdock.router.frontdoor.openapi_bodies import BODIES

SCHEMAS = document()["components"]["schemas"]
LEAST: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatBody": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "CompletionBody": ("/v1/completions", {"prompt": "x"}),
    "ResponseBody": ("/v1/responses", {"input": "x"}),
}
NEEDED: dict[str, dict[str, Any]] = {  # by what a value of a field cannot stand alone
    "max_tokens": {"prompt_logprobs": 1},
    "best_of": {"temperature": 1},
    "min_tokens": {"max_tokens": 5},
}
CHAT_NEEDS = {"top_logprobs": {"logprobs": True}}
RESPONSE_NEEDS = {"top_logprobs": {"include": ["message.output_text.logprobs"]}, "max_tokens": {}}


def numbers(kind: str) -> Iterator[tuple[str, str, float]]:
    """Bounds of a body's numbers: field, which bound, value."""
    for name, told in SCHEMAS[kind]["properties"].items():
        for branch in told.get("anyOf", [told]):
            for bound in ("minimum", "maximum", "exclusiveMinimum"):
                if bound in branch:
                    yield name, bound, branch[bound]


@pytest.mark.parametrize("kind", LEAST)
async def test_numbers_are_taken_up_to_their_bounds_and_no_further(rig: Rig, kind: str) -> None:
    path, least = LEAST[kind]
    needs = NEEDED | {"ChatBody": CHAT_NEEDS, "ResponseBody": RESPONSE_NEEDS}.get(kind, {})
    seen = set()
    for name, bound, value in numbers(kind):
        seen.add(name)
        beyond = value if bound == "exclusiveMinimum" else value + (1 if bound == "maximum" else -1)
        body = least | {"max_tokens": 2} | needs.get(name, {})
        if name in ("max_completion_tokens", "max_output_tokens"):
            del body["max_tokens"]
        _, _, refused = await post(rig, path, body | {name: beyond})
        assert refused["error"]["param"] == name, (name, beyond, refused)
        if bound != "exclusiveMinimum":
            status, _, answer = await post(rig, path, body | {name: value})
            assert status == 200, (name, value, answer)
    assert {"temperature", "top_k", "seed", "top_logprobs", "priority"} - seen <= (
        {"top_logprobs"} if kind == "CompletionBody" else set()
    )


def test_every_field_that_is_taken_is_told_with_its_type() -> None:
    for kind in BODIES:
        told = SCHEMAS[kind.__name__]["properties"]
        for field in msgspec.structs.fields(kind):
            schema = told[field.name]
            assert schema.keys() & {"type", "anyOf", "enum", "$ref"}, (kind, field.name)
        if issubclass(kind, SamplingFields):
            assert told.keys() >= CHANGE_THE_ANSWER.keys() | CHANGE_NOTHING
            for name in CHANGE_NOTHING - set(kind.__struct_fields__):
                assert told[name]["description"]


@pytest.mark.parametrize("kind", LEAST)
async def test_what_is_taken_as_it_is_alone_is_taken_so(rig: Rig, kind: str) -> None:
    path, least = LEAST[kind]
    for name, told in SCHEMAS[kind]["properties"].items():
        for value in told.get("enum", ()):
            body = least | {"max_tokens": 1, name: value}
            status, _, answer = await post(rig, path, body)
            assert status == 200, (name, value, answer)


@pytest.mark.parametrize(("kind", "field", "value"), [
    ("ChatBody", "stop", ["x" * 257]), ("ChatBody", "stop", ["x"] * 17),
    ("ChatBody", "stop_token_ids", [1] * 65), ("ChatBody", "logit_bias", {"1": 101}),
    ("ChatBody", "cache_salt", "x" * 257), ("ChatBody", "messages", []),
    ("ResponseBody", "metadata", {str(i): "" for i in range(17)}),
    ("ResponseBody", "include", ["nothing"]), ("ResponseBody", "n", 2),
    ("CompletionBody", "prompt", ["x"] * 65), ("ChatBody", "tool_choice", "perhaps"),
])  # fmt: skip
async def test_what_breaks_a_bound_of_texts_and_lists_is_refused(
    rig: Rig, kind: str, field: str, value: Any
) -> None:
    path, least = LEAST[kind]
    status, _, answer = await post(rig, path, least | {"max_tokens": 1, field: value})
    assert status == 400
    assert answer["error"]["param"].startswith(field)


@pytest.mark.parametrize("kind", ["ChatBody", "CompletionBody"])
async def test_max_tokens_may_be_0_where_it_says_so(rig: Rig, kind: str) -> None:
    path, least = LEAST[kind]
    root = {"$ref": f"#/components/schemas/{kind}", "components": document()["components"]}
    more: list[dict[str, Any]] = [{}, {"prompt_logprobs": 1}, {"prompt_logprobs": None}]
    if kind == "ChatBody":
        more += [{"max_completion_tokens": 1}, {"max_completion_tokens": None}]
    else:
        more += [{"echo": True}, {"echo": False}, {"echo": True, "prompt_logprobs": 0}]
    for given in more:
        for tokens in (0, 1, None):
            body = least | given | {"max_tokens": tokens}
            told = jsonschema.Draft202012Validator(root).is_valid(body)
            status, _, answer = await post(rig, path, body)
            assert told == (status == 200), (body, answer)
            assert status == 200 or answer["error"]["param"] == "max_tokens"
