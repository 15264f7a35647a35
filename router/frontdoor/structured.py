"""What a body of the OpenAI HTTP API says of the form of its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind

# By vLLM's names: in `structured_outputs`, and after `guided_` in fields of the body.
_KINDS = {
    "json": GrammarKind.JSON_SCHEMA,
    "regex": GrammarKind.REGEX,
    "grammar": GrammarKind.LARK,
    "choice": GrammarKind.CHOICE,
}
_ANY_OBJECT = Grammar(GrammarKind.JSON_OBJECT)


class StructuredFields(msgspec.Struct, kw_only=True):
    """OpenAI's field and vLLM's; at most one of them may ask for something."""

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_grammar: Any = None
    guided_choice: Any = None
    guided_json_object: bool | None = None


def grammar_of(body: StructuredFields) -> tuple[str, Grammar] | None:
    """The field that asks for a grammar, and the grammar; None: any text will do. Raises
    InvalidRequest for one that is none, and for two. Whether it can be used is not looked into."""
    asked = [
        found
        for found in (
            _response_format(body.response_format),
            _structured_outputs(body.structured_outputs),
            *(_of(f"guided_{name}", name, getattr(body, f"guided_{name}")) for name in _KINDS),
            ("guided_json_object", _ANY_OBJECT) if body.guided_json_object else None,
        )
        if found is not None
    ]
    if len(asked) > 1:
        (first, _), (second, grammar) = asked[:2]
        raise InvalidRequest(second, grammar.text, f"cannot be had together with {first}")
    for field, grammar in asked:
        grammar.validate(field)
        return field, grammar
    return None


def _response_format(given: Any) -> tuple[str, Grammar] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidRequest("response_format", given, "must be an object")
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return "response_format", _ANY_OBJECT
    if kind != "json_schema":
        limit = "must be text, json_object or json_schema"
        raise InvalidRequest("response_format.type", kind, limit)
    wrapped, field = given.get("json_schema"), "response_format.json_schema"
    if not isinstance(wrapped, Mapping):
        raise InvalidRequest(field, wrapped, "must be an object with name and schema")
    if not isinstance(wrapped.get("name", ""), str):
        raise InvalidRequest(f"{field}.name", wrapped["name"], "must be a text")
    if not isinstance(wrapped.get("strict"), bool | None):
        raise InvalidRequest(f"{field}.strict", wrapped["strict"], "must be true or false")
    if wrapped.get("schema") is None:
        raise InvalidRequest(f"{field}.schema", None, "is required")
    return _of(f"{field}.schema", "json", wrapped["schema"])


def _structured_outputs(given: Any) -> tuple[str, Grammar] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidRequest("structured_outputs", given, "must be an object")
    asked: list[tuple[str, Grammar]] = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        field = f"structured_outputs.{name}"
        if name == "json_object" and value is True:
            asked.append((field, _ANY_OBJECT))
        elif name in _KINDS:
            found = _of(field, name, value)
            asked += [found] if found is not None else []
        else:
            raise InvalidRequest(field, value, "is not supported by this server")
    if len(asked) > 1:
        limit = f"must be one of json_object, {', '.join(_KINDS)}"
        raise InvalidRequest("structured_outputs", sorted(given), limit)
    return asked[0] if asked else None


def _of(field: str, name: str, value: Any) -> tuple[str, Grammar] | None:
    if value is None:
        return None
    kind = _KINDS[name]
    if kind in (GrammarKind.REGEX, GrammarKind.LARK):
        if not isinstance(value, str):
            raise InvalidRequest(field, value, "must be a text")
        return field, Grammar(kind, value)
    if kind is GrammarKind.CHOICE:
        good = isinstance(value, list) and value and all(isinstance(each, str) for each in value)
        if not good:
            raise InvalidRequest(field, value, "must be a list of texts")
        return field, Grammar(kind, dump(field, value))
    if isinstance(value, str):  # a schema as text
        return field, Grammar(kind, value)
    if not isinstance(value, Mapping | bool):
        raise InvalidRequest(field, value, "must be a JSON schema")
    return field, Grammar(kind, dump(field, value))


def dump(field: str, value: Any) -> str:
    """JSON of what came as JSON. Raises InvalidRequest where it is nested too deeply."""
    try:
        return json.dumps(value)
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(field, str(error), "must be plain JSON") from None
