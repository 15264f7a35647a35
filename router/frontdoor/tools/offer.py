"""What a request offers its model: tools, and whether it must call one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossdock.proto.errors import InvalidRequest

MAX_TOOLS = 128
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
NAME = r"[a-zA-Z0-9_.:-]{1,64}"  # of a tool


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


@dataclass(frozen=True)
class Choice:
    """What a request says of calling: "auto", "none", "required", or a tool by its `name`."""

    mode: str = "auto"
    name: str | None = None


def offer_of(tools: Any, choice: Any, parallel: bool | None) -> Offer:
    """From the body's `tools`, `tool_choice` and `parallel_tool_calls`. Raises InvalidRequest."""
    if tools is not None and not isinstance(tools, list):
        raise InvalidRequest("tools", tools, "must be a list of tools")
    check_count("tools", len(tools or ()))
    found = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or [])]
    if found or choice not in (None, "auto", "none"):
        name = "tool_choice.function.name"
        return make_offer(found, _choice(choice, found), parallel is not False, named=name)
    return Offer()


def check_count(field: str, count: int) -> None:
    """Before they are looked at. Raises InvalidRequest for too many tools."""
    if count > MAX_TOOLS:
        raise InvalidRequest(field, f"{count} tools", f"at most {MAX_TOOLS}")


def make_offer(
    found: Sequence[Tool], choice: Choice, parallel: bool, *, prefix: str = "", named: str
) -> Offer:
    """With `none` nothing is offered; a named tool is the only one. `prefix` stands before the
    names of fields, `named` is where the tool's name is said. Raises InvalidRequest."""
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{prefix}tools", twice, "each name must be given once")
    if choice.name is None and choice.mode != "required":
        return Offer() if choice.mode == "none" else Offer(tuple(found), False, parallel)
    if not found:
        raise InvalidRequest(f"{prefix}tool_choice", choice.name or choice.mode, "needs tools")
    if choice.name is None:
        return Offer(tuple(found), True, parallel)
    only = tuple(tool for tool in found if tool.name == choice.name)
    if not only:
        raise InvalidRequest(named, choice.name, f"must be one of the tools: {', '.join(names)}")
    return Offer(only, True, False)


def _choice(given: Any, found: Sequence[Tool]) -> Choice:
    if given in (None, "auto", "none", "required"):
        return Choice(given or "auto")
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        limit = "must be none, auto, required or {type: function, function: {name}}"
        raise InvalidRequest("tool_choice", given, limit if found else "needs tools")
    return Choice(name=name)


def _tool(field: str, given: Any) -> Tool:
    if not isinstance(given, Mapping):
        raise InvalidRequest(field, given, "must be an object")
    if given.get("type") != "function":
        raise InvalidRequest(f"{field}.type", given.get("type"), 'must be "function"')
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{field}.function", function, "must be an object with a name")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidRequest(f"{field}.function.parameters", parameters, "must be a JSON schema")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidRequest(f"{field}.function.strict", strict, "must be true or false")
    return make_tool(f"{field}.function.name", function.get("name"), parameters, strict, given)


def make_tool(
    field: str, name: Any, parameters: Mapping[str, Any] | None, strict: bool | None, given: Any
) -> Tool:
    """A tool whose name was said in `field`. Raises InvalidRequest for a name that is none."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise InvalidRequest(field, name, "must be 1 to 64 letters, digits, _, -, . and :")
    schema = dict(parameters) if parameters else NO_PARAMETERS
    return Tool(name, {"type": "object"} | schema, bool(strict), given)
