"""A chat as gRPC's clients send it."""

from __future__ import annotations

import json
from typing import Any

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.frontdoor.tools.conversation import Conversation, calls_of, check_json


def conversation_of_pb(chat: pb.Chat) -> Conversation:
    """What the template is given. Raises InvalidRequest."""
    arguments = [call.arguments for message in chat.messages for call in message.tool_calls]
    check_json("chat", [*arguments, chat.template_kwargs])
    options: Any = {}
    if chat.template_kwargs:
        try:
            options = json.loads(chat.template_kwargs)
        except (ValueError, RecursionError):
            options = None
        if not isinstance(options, dict):
            limit = "must be a JSON object"
            raise InvalidRequest("chat.template_kwargs", chat.template_kwargs, limit)
    return Conversation(
        [_plain(f"chat.messages[{i}]", message) for i, message in enumerate(chat.messages)],
        options=options,
        add_generation_prompt=not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
    )


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
