"""Bodies as /openapi.json tells them: types of the structs that read them, with the bounds of what
is checked later, the shapes of what those structs leave open, and what is taken beside them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from crossdock.model.grammar import MAX_CHOICES
from crossdock.proto.types import (
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RANGES,
)
from crossdock.router.frontdoor.openai_fields import (
    A_MESSAGE_IGNORES,
    CHANGE_A_MESSAGE,
    CHANGE_NOTHING,
    CHANGE_THE_ANSWER,
)
from crossdock.router.frontdoor.openai_schemas import (
    ChatBody,
    CompletionBody,
    ContentPart,
    DetokenizeBody,
    Message,
    ResponseBody,
    SamplingFields,
    TokenizeBody,
)
from crossdock.router.frontdoor.responses_input import (
    INCLUDE_LOGPROBS,
    INCLUDE_NOTHING,
    MAX_KEY_CHARACTERS,
    MAX_METADATA,
    MAX_VALUE_CHARACTERS,
)
from crossdock.router.frontdoor.tools.offer import MAX_TOOLS, NAME
from crossdock.router.frontdoor.validate import (
    LEAST_PRIORITY,
    MAX_LABEL_CHARACTERS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MOST_PRIORITY,
    ROLES,
)

Schema = dict[str, Any]

BODIES: tuple[type, ...] = (ChatBody, CompletionBody, ResponseBody, TokenizeBody, DetokenizeBody)
ONLY_AS_IS = "Not supported: taken where it asks for what is done anyway."
IGNORED = "Changes nothing."


def _list(items: Schema, most: int | None = None, least: int = 0) -> Schema:
    bounds = {"minItems": least, "maxItems": most}
    return {"type": "array", "items": items} | {name: n for name, n in bounds.items() if n}


def _object(needed: Sequence[str] = (), **properties: Schema) -> Schema:
    found = {"type": "object", "properties": properties}
    return found | ({"required": list(needed)} if needed else {})


def _any(*kinds: Schema) -> Schema:
    return {"anyOf": list(kinds)}


def _only(*values: Any) -> Schema:
    return {"enum": list(values)}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_NULL: Schema = {"type": "null"}
_LABEL = _TEXT | {"maxLength": MAX_LABEL_CHARACTERS}
_IDS = _list({"type": "integer", "minimum": 0}, least=1)
_GRAMMAR = _TEXT | {"minLength": 1, "maxLength": MAX_GRAMMAR_BYTES}
_SCHEMA = _any(_object(), _FLAG, _GRAMMAR)
_CHOICES = _list(_TEXT | {"minLength": 1}, MAX_CHOICES, 1)
_PROMPT = _TEXT | {"minLength": 1}
_STOP = _TEXT | {"minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_NAME = _TEXT | {"pattern": f"^{NAME}$"}
_NAMED_FORM = {"name": _TEXT, "description": _TEXT, "schema": _SCHEMA, "strict": _FLAG}
_FUNCTION = {
    "name": _NAME,
    "description": _TEXT,
    "parameters": _any(_object(), _NULL),
    "strict": _any(_FLAG, _NULL),
}
_IS_FUNCTION = _only("function")
_MODE = _only("none", "auto", "required")
_CALLS = _list(
    _object(
        ("function",),
        id=_TEXT,
        type=_IS_FUNCTION,
        function=_object(("name",), name=_TEXT, arguments=_any(_TEXT, _object(), _NULL)),
    )
)


def _part(kind: str) -> Schema:
    return _object(("type", "text"), type=_only(kind), text=_TEXT)


_ITEM = _any(
    _object(
        ("role", "content"),
        type=_only("message"),
        role=_only(*(role for role in ROLES if role != "tool")),
        content=_any(_TEXT, _list(_any(_part("input_text"), _part("output_text")))),
    ),
    _object(
        ("type", "call_id", "name", "arguments"),
        type=_only("function_call"),
        **dict.fromkeys(("call_id", "name", "arguments"), _TEXT),
    ),
    _object(
        ("type", "call_id", "output"),
        type=_only("function_call_output"),
        call_id=_TEXT,
        output=_any(_TEXT, _list(_part("input_text"))),
    ),
)

# What is checked of a field after it was read: of its branch of this type.
_BOUNDS: Mapping[str, Schema] = {
    **{name: {"minimum": low, "maximum": high} for name, (low, high) in RANGES.items()},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "n": {"minimum": 1, "maximum": MAX_N},
    "best_of": {"minimum": 1, "maximum": MAX_N},
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "priority": {"minimum": LEAST_PRIORITY, "maximum": MOST_PRIORITY},
    "cache_salt": {"maxLength": MAX_LABEL_CHARACTERS},
    "messages": {"minItems": 1, "maxItems": MAX_MESSAGES},
}
# What the structs leave open, or say too little of.
_SHAPES: Mapping[str, Schema] = {
    "logit_bias": {
        "type": "object",
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "stop": _any(_STOP, _list(_STOP, MAX_STOP_STRINGS)),
    "stop_token_ids": _list({"type": "integer", "minimum": 0}, MAX_STOP_TOKEN_IDS),
    "response_format": _any(
        _object(("type",), type=_only("text", "json_object")),
        _object(
            ("type", "json_schema"),
            type=_only("json_schema"),
            json_schema=_object(("schema",), **_NAMED_FORM),
        ),
    ),
    "structured_outputs": _object(
        json=_SCHEMA, regex=_GRAMMAR, grammar=_GRAMMAR, choice=_CHOICES, json_object=_FLAG
    ),
    "guided_json": _SCHEMA,
    "guided_regex": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "guided_choice": _CHOICES,
    "tools": _list(
        _object(("type", "function"), type=_IS_FUNCTION, function=_object(("name",), **_FUNCTION)),
        MAX_TOOLS,
    ),
    "tool_choice": _any(
        _MODE,
        _object(("type", "function"), type=_IS_FUNCTION, function=_object(("name",), name=_NAME)),
    ),
}
# The same of one body alone.
_SHAPES_OF: Mapping[type, Mapping[str, Schema]] = {
    ContentPart: {"type": _only("text")},
    Message: {"role": _only(*ROLES), "tool_calls": _CALLS},
    CompletionBody: {
        "prompt": _any(
            _PROMPT,
            _IDS,
            _list(_any(_PROMPT, _IDS), MAX_PROMPTS, 1),
        )
    },
    ResponseBody: {
        "input": _any(_TEXT, _list(_ITEM, MAX_MESSAGES)),
        "n": _only(1),
        "max_tokens": {"type": "integer", "minimum": 1},
        "tools": _list(
            _object(("type", "name"), type=_IS_FUNCTION, **_FUNCTION),
            MAX_TOOLS,
        ),
        "tool_choice": _any(_MODE, _object(("type", "name"), type=_IS_FUNCTION, name=_NAME)),
        "text": _object(
            format=_any(
                _object(("type",), type=_only("text", "json_object")),
                _object(("type", "schema"), type=_only("json_schema"), **_NAMED_FORM),
                _NULL,
            ),
            verbosity=_only("medium", None),
        ),
        "reasoning": _object(effort=_any(_TEXT, _NULL)),
        "include": _list(_only(INCLUDE_LOGPROBS, *sorted(INCLUDE_NOTHING))),
        "metadata": {
            "type": "object",
            "maxProperties": MAX_METADATA,
            "propertyNames": {"maxLength": MAX_KEY_CHARACTERS},
            "additionalProperties": _TEXT | {"maxLength": MAX_VALUE_CHARACTERS},
        },
        "truncation": _only("disabled"),
        "background": _only(False),
        **dict.fromkeys(
            ("conversation", "prompt", "context_management", "moderation", "prompt_logprobs"),
            _NULL | {"description": ONLY_AS_IS},
        ),
    },
    TokenizeBody: {"prompt": _PROMPT, "add_special_tokens": _only(True)},
    DetokenizeBody: {"tokens": _list({"type": "integer", "minimum": 0})},
}
_NEEDED: Mapping[type, list[str]] = {CompletionBody: ["prompt"], ResponseBody: ["input"]}
_EITHER = {TokenizeBody: ("prompt", "messages")}  # one of these, and the other not
_INTEGER: Schema = {"type": "integer"}
# With one of these max_tokens may be 0.
_ASKS_OF_THE_PROMPT: Mapping[type, Mapping[str, Schema]] = {
    CompletionBody: {"echo": {"const": True}, "prompt_logprobs": _INTEGER},
    ChatBody: {"max_completion_tokens": _INTEGER, "prompt_logprobs": _INTEGER},
}


def describe(components: dict[str, Any]) -> None:
    """Completes what msgspec says of `BODIES` and of what they hold, in place."""
    for kind in (*BODIES, Message, ContentPart):
        told = components[kind.__name__]
        properties: dict[str, Any] = told["properties"]
        for name, plain in properties.items():
            properties[name] = _described(kind, name, plain)
        if kind in _NEEDED:
            told["required"] = _NEEDED[kind]
        if kind in _EITHER:
            one, other = _EITHER[kind]
            told["oneOf"] = [_alone(one, other), _alone(other, one)]
        if kind in _ASKS_OF_THE_PROMPT:
            asks = _ASKS_OF_THE_PROMPT[kind].items()
            told["anyOf"] = [{"properties": {"max_tokens": {"not": {"const": 0}}}}]
            told["anyOf"] += [{"required": [n], "properties": {n: each}} for n, each in asks]
        if issubclass(kind, SamplingFields):
            _add(properties, CHANGE_THE_ANSWER, CHANGE_NOTHING)
    _add(components[Message.__name__]["properties"], CHANGE_A_MESSAGE, A_MESSAGE_IGNORES)


def _alone(name: str, other: str) -> Schema:
    return {"required": [name], "properties": {name: {"not": _NULL}, other: _NULL}}


def _described(kind: type, name: str, plain: Mapping[str, Any]) -> Schema:
    shape = _SHAPES_OF.get(kind, {}).get(name) or _SHAPES.get(name)
    required = "default" not in plain
    if shape is not None:
        return shape if required or name in _NEEDED.get(kind, ()) else _or_null(shape)
    found = copy.deepcopy(dict(plain))
    for branch in found.get("anyOf", [found]):
        if branch.get("type") in ("integer", "number", "string", "array"):
            branch.update(_BOUNDS.get(name, {}))
    return found


def _or_null(shape: Schema) -> Schema:
    found = dict(shape)
    if "enum" in found:
        found["enum"] = [*found["enum"], None]
    elif "anyOf" in found:
        found["anyOf"] = [*found["anyOf"], _NULL]
    elif found != _NULL and found.get("type") != "null":
        found = {"anyOf": [found, _NULL]}
    return found | {"default": None}


def _add(
    properties: dict[str, Any], as_is: Mapping[str, tuple[Any, ...]], ignored: frozenset[str]
) -> None:
    """Fields that no struct has, and that are known."""
    for name, harmless in as_is.items():
        properties.setdefault(name, {"enum": [*harmless, None], "description": ONLY_AS_IS})
    for name in sorted(ignored):
        properties.setdefault(name, {"description": IGNORED})
