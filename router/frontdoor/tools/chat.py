"""A chat's body: its messages, its tools, and what both ask of the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crossdock.model.text import TextModel
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind
from crossdock.router.frontdoor.openai_schemas import ChatBody, Message, TokenizeBody
from crossdock.router.frontdoor.structured import StructuredFields, grammar_of
from crossdock.router.frontdoor.tools.conversation import Conversation, calls_of, check_json
from crossdock.router.frontdoor.tools.formats import NONE, ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer, offer_of


def tools_of(body: StructuredFields) -> Offer:
    """What is offered. Raises InvalidRequest."""
    if not isinstance(body, ChatBody):
        return Offer()
    return offer_of(body.tools, body.tool_choice, body.parallel_tool_calls)


def form_of(
    body: StructuredFields, offer: Offer, text: TextModel, how: ToolFormat
) -> tuple[str, Grammar] | None:
    """See `form`."""
    return form(grammar_of(body), offer, text, how)


def form(
    asked: tuple[str, Grammar] | None,
    offer: Offer,
    text: TextModel,
    how: ToolFormat,
    prefix: str = "",  # of the names of fields
) -> tuple[str, Grammar] | None:
    """The field that asks for a grammar, and the grammar: what is `asked` for of the answer's text,
    calls where they must be made, or either where both may be. Raises InvalidRequest."""
    if not offer.tools or (how is NONE and not offer.must):
        return asked
    if how is NONE:
        limit = "calls are not read here: tool_parser is none"
        raise InvalidRequest(f"{prefix}tool_choice", "given", limit)
    if offer.must:  # then there is no text that could have another form
        return f"{prefix}tools", how.grammar(offer, text)
    if asked is None:
        return None
    field, grammar = asked
    if grammar.kind is GrammarKind.LARK or not how.begin:
        why = (
            "the model's calls begin like other JSON" if not how.begin else "it is a whole grammar"
        )
        limit = f"cannot be had together with tools that may be called, as {why}"
        raise InvalidRequest(field, grammar.kind, limit)
    try:
        return field, how.grammar(offer, text, instead=grammar)
    except InvalidRequest as error:
        raise InvalidRequest(field, error.value, error.limit) from None


def conversation_of(body: ChatBody | TokenizeBody, offer: Offer) -> Conversation:
    """What the template is given. Raises InvalidRequest."""
    continues = bool(body.continue_final_message)
    prompts = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if continues and prompts:
        limit = "must be false where continue_final_message is true"
        raise InvalidRequest("add_generation_prompt", True, limit)
    check_json("messages.tool_calls", _arguments(body.messages or ()))
    effort: dict[str, Any] = {}
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        effort["reasoning_effort"] = body.reasoning_effort
    return Conversation(
        [_plain(f"messages[{i}]", message) for i, message in enumerate(body.messages or ())],
        offer,
        effort | (body.chat_template_kwargs or {}),
        prompts,
        continues,
    )


def _arguments(messages: Sequence[Message]) -> Iterator[str]:
    """Those that are texts, as they should be."""
    for message in messages:
        for call in message.tool_calls if isinstance(message.tool_calls, list) else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
                yield function["arguments"]


def _plain(where: str, message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": _content(where, message)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls and message.role != "assistant":
        limit = "only messages of the assistant have them"
        raise InvalidRequest(f"{where}.tool_calls", message.tool_calls, limit)
    if message.tool_calls:
        plain["tool_calls"] = calls_of(f"{where}.tool_calls", message.tool_calls)
    if message.tool_call_id is not None:
        if message.role != "tool":
            limit = "only messages of a tool have it"
            raise InvalidRequest(f"{where}.tool_call_id", message.tool_call_id, limit)
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _content(where: str, message: Message) -> str:
    content = message.content
    if not isinstance(content, list):
        return content or ""
    for j, part in enumerate(content):
        if part.type != "text":
            field = f"{where}.content[{j}].type"
            raise InvalidRequest(field, part.type, 'only "text" parts are supported')
    return "".join(part.text or "" for part in content)
