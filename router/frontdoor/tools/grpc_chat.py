"""A chat as gRPC's clients send it, and calls as they get them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.frontdoor.json_body import spells_half
from crossdock.router.frontdoor.tools.conversation import Conversation, calls_of, check_json
from crossdock.router.frontdoor.tools.offer import (
    Choice,
    Offer,
    Tool,
    check_count,
    make_offer,
    make_tool,
)
from crossdock.router.frontdoor.tools.reading import CallPiece
from crossdock.router.frontdoor.validate import MAX_MESSAGES, check_count_of_messages


def offer_of_pb(chat: pb.Chat) -> Offer:
    """What is offered. Raises InvalidRequest."""
    check_count("chat.tools", len(chat.tools))
    check_json("chat.tools", [tool.parameters for tool in chat.tools])
    found = [_tool(f"chat.tools[{i}]", tool) for i, tool in enumerate(chat.tools)]
    said = chat.tool_choice
    choice = Choice(name=said.name) if said.WhichOneof("choice") == "name" else _mode(said.mode)
    parallel = chat.parallel_tool_calls or not chat.HasField("parallel_tool_calls")
    return make_offer(found, choice, parallel, prefix="chat.", named="chat.tool_choice.name")


def conversation_of_pb(chat: pb.Chat, offer: Offer) -> Conversation:
    """What the template is given. Raises InvalidRequest."""
    check_count_of_messages("chat.messages", len(chat.messages))
    calls = sum(len(message.tool_calls) for message in chat.messages)
    if calls > MAX_MESSAGES:  # each of which has its own message that answers it
        raise InvalidRequest("chat.messages", f"{calls} tool calls", f"at most {MAX_MESSAGES}")
    arguments = [call.arguments for message in chat.messages for call in message.tool_calls]
    check_json("chat", [*arguments, chat.template_kwargs])
    return Conversation(
        [_plain(f"chat.messages[{i}]", message) for i, message in enumerate(chat.messages)],
        offer,
        options=_object("chat.template_kwargs", chat.template_kwargs),
        add_generation_prompt=not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
    )


def calls_to_pb(calls: Iterable[CallPiece]) -> list[pb.ToolCall]:
    """As a response or a completion has them."""
    return [pb.ToolCall(**vars(call)) for call in calls]


def _mode(given: int) -> Choice:
    kind = pb.ToolChoice.Mode
    if given not in kind.values():
        raise InvalidRequest("chat.tool_choice.mode", given, f"must be of {', '.join(kind.keys())}")
    return Choice(kind.Name(given).lower())


def _tool(where: str, tool: pb.Tool) -> Tool:
    """Templates are shown a tool as OpenAI's clients write one."""
    parameters = _object(f"{where}.parameters", tool.parameters)
    function: dict[str, Any] = {"name": tool.name}
    if tool.HasField("description"):
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = parameters
    if tool.HasField("strict"):
        function["strict"] = tool.strict
    given = {"type": "function", "function": function}
    return make_tool(f"{where}.name", tool.name, parameters, tool.strict, given)


def _object(where: str, text: str) -> dict[str, Any]:
    """What a JSON object says; an empty text is an empty one. Raises InvalidRequest."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest(where, text, "must be a JSON object")
    if spells_half(text, found):
        raise InvalidRequest(where, text, "must be valid Unicode")
    return found


def _plain(where: str, message: pb.ChatMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        plain["name"] = message.name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        calls = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        plain["tool_calls"] = calls_of(f"{where}.tool_calls", calls)
    return plain
