"""What a request offers its model: tools, and whether it must call one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crossdock.proto.errors import InvalidRequest

MAX_TOOLS = 128
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Mapping[str, Any]  # a JSON schema of an object
    strict: bool
    given: Mapping[str, Any]  # as the client wrote it, for the template


@dataclass(frozen=True)
class Offer:
    """The tools of a request. Where `must` is set its answer is calls and nothing else."""

    tools: tuple[Tool, ...] = ()
    must: bool = False
    parallel: bool = True  # several calls in one answer


def offer_of(tools: Any, choice: Any, parallel: bool | None) -> Offer:
    """From the body's `tools`, `tool_choice` and `parallel_tool_calls`. With `none` nothing is
    offered; a named tool is the only one. Raises InvalidRequest."""
    if tools is not None and not isinstance(tools, list):
        raise InvalidRequest("tools", tools, "must be a list of tools")
    found = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or [])]
    if len(found) > MAX_TOOLS:
        raise InvalidRequest("tools", f"{len(found)} tools", f"at most {MAX_TOOLS}")
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest("tools", twice, "each name must be given once")
    several = parallel is not False
    if choice in (None, "auto", "none"):
        return Offer() if choice == "none" else Offer(tuple(found), False, several)
    if not found:
        raise InvalidRequest("tool_choice", choice, "needs tools")
    if choice == "required":
        return Offer(tuple(found), True, several)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        limit = "must be none, auto, required or {type: function, function: {name}}"
        raise InvalidRequest("tool_choice", choice, limit)
    named = tuple(tool for tool in found if tool.name == name)
    if not named:
        limit = f"must be one of the tools: {', '.join(names)}"
        raise InvalidRequest("tool_choice.function.name", name, limit)
    return Offer(named, True, False)


def _tool(field: str, given: Any) -> Tool:
    if not isinstance(given, Mapping):
        raise InvalidRequest(field, given, "must be an object")
    if given.get("type") != "function":
        raise InvalidRequest(f"{field}.type", given.get("type"), 'must be "function"')
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{field}.function", function, "must be an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        limit = "must be 1 to 64 letters, digits, _, -, . and :"
        raise InvalidRequest(f"{field}.function.name", name, limit)
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidRequest(f"{field}.function.parameters", parameters, "must be a JSON schema")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidRequest(f"{field}.function.strict", strict, "must be true or false")
    schema = dict(parameters) if parameters else NO_PARAMETERS
    return Tool(name, {"type": "object"} | schema, bool(strict), given)
