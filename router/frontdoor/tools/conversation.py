"""Messages of a chat as the model's template takes them, tools and calls included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossdock.model.text import TextModel
from crossdock.proto.errors import InvalidRequest
from crossdock.router.frontdoor.json_body import spells_half
from crossdock.router.frontdoor.tools.formats import ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer

MAX_MARKS = 131_072  # in JSON that comes within texts: as many values at the most

_INTRODUCTION = """\
You may call functions. Their signatures:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON:
{example}"""


@dataclass(frozen=True)
class Conversation:
    """What is rendered: messages, and the fields of model.chat_template.Rendering."""

    messages: Sequence[Mapping[str, Any]]
    offer: Offer = field(default_factory=Offer)
    options: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def rendered(
        self, text: TextModel, how: ToolFormat
    ) -> tuple[list[Mapping[str, Any]], bool, dict[str, Any]]:
        """The arguments of TextModel.apply_chat_template. A template that knows nothing of tools is
        told of them in the system message, and shown calls and their results as text."""
        messages = list(self.messages)
        tools = [dict(tool.given) for tool in self.offer.tools]
        if text.template is not None and not text.template.takes_tools:
            messages, tools = [*_spelled_out(messages, self.offer, how)], []
        more = {
            "tools": tools,
            "options": dict(self.options),
            "continue_final_message": self.continue_final_message,
        }
        return messages, self.add_generation_prompt, more


def check_json(field: str, texts: Iterable[str], most: int = MAX_MARKS) -> None:
    """Bounds what JSON that comes within texts is made objects of, which nothing else does. Raises
    InvalidRequest."""
    found = sum(text.count(mark) for text in texts for mark in "{[,")
    if found > most:
        limit = f"at most {most} of {{, [ and , in all of a request's"
        raise InvalidRequest(field, f"{found} of {{, [ and ,", limit)


def calls_of(where: str, given: Any) -> list[dict[str, Any]]:
    """An assistant message's `tool_calls` as templates take them: arguments as objects. Raises
    InvalidRequest."""
    if not isinstance(given, list):
        raise InvalidRequest(where, given, "must be a list of calls")
    calls = []
    for i, call in enumerate(given):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            limit = "must be {id, type: function, function: {name, arguments}}"
            raise InvalidRequest(f"{where}[{i}]", call, limit)
        if not isinstance(call.get("id", ""), str):
            raise InvalidRequest(f"{where}[{i}].id", call["id"], "must be a text")
        arguments = _object(f"{where}[{i}].function.arguments", function.get("arguments"))
        named = {"name": function["name"], "arguments": arguments}
        calls.append({"id": call.get("id", ""), "type": "function", "function": named})
    return calls


def _object(where: str, given: Any) -> Any:
    """Arguments come as JSON in a text; what a model wrote need not be valid, and stays text."""
    if not isinstance(given, str):
        if isinstance(given, Mapping | None):
            return dict(given or {})
        raise InvalidRequest(where, given, "must be JSON in a text")
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return found if isinstance(found, dict) and not spells_half(given, found) else given


def _spelled_out(
    messages: Sequence[Mapping[str, Any]], offer: Offer, how: ToolFormat
) -> list[dict[str, Any]]:
    plain = [_as_text(message, how) for message in messages]
    if not offer.tools:
        return plain
    example = how.written([{"name": "NAME", how.arguments_key: {"ARGUMENT": "VALUE"}}])
    shown = "\n".join(json.dumps(tool.given, ensure_ascii=False) for tool in offer.tools)
    told = _INTRODUCTION.format(tools=shown, example=example)
    if plain and plain[0]["role"] in ("system", "developer"):
        first = plain[0] | {"content": f"{plain[0]['content']}\n\n{told}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _as_text(message: Mapping[str, Any], how: ToolFormat) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if calls := message.get("tool_calls"):
        named = ({"name": call["function"]["name"],
                  how.arguments_key: call["function"]["arguments"]} for call in calls)  # fmt: skip
        content = f"{content}\n{how.written(named)}".strip()
    return {"role": message["role"], "content": content}
