"""A chat as clients write one, OpenAI's way, on its way into a GenerateRequest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crossdock.proto import errors
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.results import ToolCall

CHAT_FIELDS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "template_kwargs",
    "continue_final_message",
)


def set_chat(
    chat: pb.Chat, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]
) -> None:
    """Messages, and what of CHAT_FIELDS is given. Raises InvalidRequest for what no chat can
    carry."""
    chat.SetInParent()
    for message in messages:
        try:
            chat.messages.append(_message(message))
        except (KeyError, TypeError, ValueError, UnicodeError):
            limit = (
                "each message is a text `role` and a text `content`; an assistant's may have "
                "`tool_calls`, a tool's has `tool_call_id`"
            )
            raise errors.InvalidRequest("messages", message, limit) from None
    for name, value in given.items():
        if value is None:
            continue
        try:
            chat.MergeFrom(_SETTERS[name](value))
        except (KeyError, TypeError, ValueError, UnicodeError, AttributeError) as error:
            raise errors.InvalidRequest(
                name, value, f"no request can carry it: {error!r}"
            ) from None


def _message(given: Mapping[str, Any]) -> pb.ChatMessage:
    calls = [_call(call) for call in given.get("tool_calls") or ()]
    content = given.get("content") if calls else given["content"]
    return pb.ChatMessage(
        role=given["role"],
        content=content or "" if calls else content,
        name=given.get("name"),
        tool_calls=calls,
        tool_call_id=given.get("tool_call_id"),
    )


def _call(given: ToolCall | Mapping[str, Any]) -> pb.ToolCall:
    if isinstance(given, ToolCall):
        return pb.ToolCall(id=given.id, name=given.name, arguments=given.arguments)
    function = given["function"]
    return pb.ToolCall(
        id=given.get("id"), name=function["name"], arguments=function.get("arguments")
    )


def _tools(given: Sequence[Mapping[str, Any]]) -> pb.Chat:
    chat = pb.Chat()
    for tool in given:
        function = tool["function"]
        known = {"name", "description", "parameters", "strict"}
        if tool.get("type") != "function" or function.keys() - known:
            raise ValueError("a tool is {type: function, function: {name, …}}")
        parameters = function.get("parameters")
        chat.tools.add(
            name=function["name"],
            description=function.get("description"),
            parameters=None if parameters is None else json.dumps(parameters),
            strict=function.get("strict"),
        )
    return chat


def _choice(given: str | Mapping[str, Any]) -> pb.Chat:
    if isinstance(given, str):
        return pb.Chat(tool_choice=pb.ToolChoice(mode=given.upper()))
    return pb.Chat(tool_choice=pb.ToolChoice(name=given["function"]["name"]))


_SETTERS: dict[str, Callable[[Any], pb.Chat]] = {
    "tools": _tools,
    "tool_choice": _choice,
    "parallel_tool_calls": lambda given: pb.Chat(parallel_tool_calls=given),
    "template_kwargs": lambda given: pb.Chat(template_kwargs=json.dumps(given)),
    "continue_final_message": lambda given: pb.Chat(continue_final_message=given),
}
