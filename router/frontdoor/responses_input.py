"""Items of the Responses API: as clients send them, as they are kept, and as messages of a chat."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from crossdock.proto.errors import InvalidRequest
from crossdock.router.frontdoor.openai_schemas import (
    ChatBody,
    Message,
    ResponseBody,
    SamplingFields,
)
from crossdock.router.frontdoor.validate import MAX_MESSAGES

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
INCLUDE_LOGPROBS = "message.output_text.logprobs"
# What these add belongs to items that no answer here has.
INCLUDE_NOTHING = frozenset(
    {
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
MAX_METADATA = 16
MAX_KEY_CHARACTERS, MAX_VALUE_CHARACTERS = 64, 512


def new_id(kind: str) -> str:
    """Of an item."""
    return f"{kind}_{secrets.token_hex(16)}"


# -- what a client sends -----------------------------------------------------------------------


def items_of(given: Any) -> list[Item]:
    """The body's `input` as items with ids. Raises InvalidRequest."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise InvalidRequest("input", given, "must be a string or a list of items")
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest("input", f"{len(given)} items", f"at most {MAX_MESSAGES}")
    return [_item(f"input[{i}]", item) for i, item in enumerate(given)]


def _item(where: str, given: Any) -> Item:
    if not isinstance(given, Mapping):
        raise InvalidRequest(where, given, "must be an object")
    kind = given.get("type", "message")
    if kind == "message":
        return _message(where, given)
    if kind == "function_call":
        item = {name: _text(where, given, name) for name in ("call_id", "name", "arguments")}
        return _head("fc", kind, given) | item
    if kind == "function_call_output":
        call_id = _text(where, given, "call_id")
        output = _parts(f"{where}.output", given.get("output"), ("input_text",))
        return _head("fco", kind, given) | {"call_id": call_id, "output": output}
    limit = "must be message, function_call or function_call_output"
    raise InvalidRequest(f"{where}.type", kind, limit)


def _message(where: str, given: Mapping[str, Any]) -> Item:
    role = given.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role", role, f"must be one of {', '.join(_ROLES)}")
    kinds = ("output_text", "input_text") if role == "assistant" else ("input_text",)
    text = _parts(f"{where}.content", given.get("content"), kinds)
    part: Item = {"type": kinds[0], "text": text}
    if role == "assistant":
        part["annotations"] = []
    return _head("msg", "message", given) | {"role": role, "content": [part]}


def _head(prefix: str, kind: str, given: Mapping[str, Any]) -> Item:
    id_ = given.get("id")
    named = isinstance(id_, str) and 0 < len(id_) <= 256
    return {"id": id_ if named else new_id(prefix), "type": kind, "status": "completed"}


def _text(where: str, given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name}", value, "must be a string")
    return value


def _parts(where: str, given: Any, kinds: Sequence[str]) -> str:
    """A text, or the texts of its parts joined."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise InvalidRequest(where, given, "must be a string or a list of parts")
    texts = []
    for i, part in enumerate(given):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds:
            limit = f'only "{kinds[0]}" parts are supported'
            raise InvalidRequest(f"{where}[{i}].type", kind, limit)
        texts.append(_text(f"{where}[{i}]", part, "text"))
    return "".join(texts)


# -- as a chat ---------------------------------------------------------------------------------


def messages_of(items: Sequence[Item]) -> list[Message]:
    """Items as messages: calls that follow each other, or what the assistant said before them, are
    one message."""
    messages: list[Message] = []
    for item in items:
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"])
            messages.append(Message(item["role"], text))
        elif item["type"] == "function_call_output":
            messages.append(Message("tool", item["output"], tool_call_id=item["call_id"]))
        else:
            if not messages or messages[-1].role != "assistant":
                messages.append(Message("assistant", ""))
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
    return messages


def chat_of(body: ResponseBody, items: Sequence[Item]) -> ChatBody:
    """The chat that a body asks to go on with, after all of `items`. Raises InvalidRequest."""
    _check_supported(body)
    given = {name: getattr(body, name) for name in SamplingFields.__struct_fields__}
    effort = _effort(body.reasoning)
    if (form := _format(body.text)) is not None:
        given["response_format"] = form
    logprobs = INCLUDE_LOGPROBS in (body.include or ())
    if body.top_logprobs and not logprobs:
        limit = f"needs include to hold {INCLUDE_LOGPROBS}"
        raise InvalidRequest("top_logprobs", body.top_logprobs, limit)
    return ChatBody(
        **given,
        messages=system_of(body) + messages_of(items),
        tools=_tools(body.tools),
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=effort,
        max_completion_tokens=body.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs,
    )


def system_of(body: ResponseBody) -> list[Message]:
    """The body's instructions, which are of this turn alone."""
    return [Message("system", body.instructions)] if body.instructions else []


def _check_supported(body: ResponseBody) -> None:
    """Raises InvalidRequest for what would change the answer and is not done here."""
    never = "conversation", "prompt", "context_management", "moderation", "prompt_logprobs"
    given: dict[str, Any] = {name: getattr(body, name) for name in never}
    given["background"] = body.background or None
    given["n"] = None if body.n == 1 else body.n
    given["truncation"] = None if body.truncation == "disabled" else body.truncation
    for name, value in given.items():
        if value is not None:
            raise InvalidRequest(name, value, "is not supported by this server")
    for i, name in enumerate(body.include or ()):
        if name != INCLUDE_LOGPROBS and name not in INCLUDE_NOTHING:
            raise InvalidRequest(f"include[{i}]", name, "is not supported by this server")
    metadata = body.metadata or {}
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest("metadata", f"{len(metadata)} keys", f"at most {MAX_METADATA}")
    for key, value in metadata.items():
        if len(key) > MAX_KEY_CHARACTERS or len(value) > MAX_VALUE_CHARACTERS:
            most = f"at most {MAX_KEY_CHARACTERS} characters, values {MAX_VALUE_CHARACTERS}"
            limit = f"keys have {most}"
            raise InvalidRequest("metadata", {key: value}, limit)


def _effort(reasoning: Any) -> str | None:
    if reasoning is None:
        return None
    if not isinstance(reasoning, Mapping):
        raise InvalidRequest("reasoning", reasoning, "must be an object")
    for name, value in reasoning.items():
        if name != "effort" and value is not None:
            raise InvalidRequest(f"reasoning.{name}", value, "is not supported by this server")
    effort = reasoning.get("effort")
    if not isinstance(effort, str | None):
        raise InvalidRequest("reasoning.effort", effort, "must be a string")
    return effort


def _format(text: Any) -> dict[str, Any] | None:
    """`text` as the chat's response_format."""
    if text is None:
        return None
    if not isinstance(text, Mapping):
        raise InvalidRequest("text", text, "must be an object")
    if text.get("verbosity") not in (None, "medium"):
        raise InvalidRequest("text.verbosity", text["verbosity"], "is not supported by this server")
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise InvalidRequest("text.format", form, "must be an object")
    if form.get("type") != "json_schema":
        return dict(form)
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}


def _tools(tools: Any) -> Any:
    """Flat functions as the chat has them; anything else is the chat's to refuse."""
    if not isinstance(tools, list):
        return tools
    found = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise InvalidRequest(f"tools[{i}].type", kind, 'only "function" is supported')
        function = {k: v for k, v in tool.items() if k != "type" and v is not None}
        found.append({"type": "function", "function": function})
    return found


def _choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        limit = "must be none, auto, required or {type: function, name}"
        raise InvalidRequest("tool_choice", choice, limit)
    return {"type": "function", "function": {"name": choice.get("name")}}


# -- as a response repeats it ------------------------------------------------------------------


def form_of(text: Any) -> dict[str, Any]:
    """The form of the answer that a body's `text` asked for."""
    form = (text or {}).get("format") or {"type": "text"}
    if form["type"] != "json_schema":
        return {"type": form["type"]}
    told = {name: form.get(name) for name in ("name", "description", "strict")}
    plain = {name: value for name, value in told.items() if isinstance(value, str | bool)}
    return {"type": "json_schema", "schema": form["schema"]} | plain


def choice_of(choice: Any) -> Any:
    """A body's `tool_choice`."""
    if isinstance(choice, Mapping):
        return {"type": "function", "name": choice["name"]}
    return choice or "auto"
