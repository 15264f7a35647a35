"""Answers of a chat in which the model may call tools."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from crossdock.proto.types import FinishReason
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.openai_format import ChatAnswer
from crossdock.router.frontdoor.tools.calls import CallArguments, CallBegun, Content, Event
from crossdock.router.frontdoor.tools.formats import ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.tools.parsers import Parser

TOOL_CALLS = "tool_calls"  # the finish_reason of an answer that calls
_ALPHABET = string.ascii_letters + string.digits
_encode = msgspec.json.encode


@dataclass
class ToolAnswer(ChatAnswer):
    """Of POST /v1/chat/completions with tools: text that is a call becomes one."""

    offer: Offer = field(kw_only=True)
    how: ToolFormat = field(kw_only=True)
    _parsers: dict[int, Parser] = field(default_factory=dict)

    def event(self, delta: Delta) -> bytes:
        """See Answer.event."""
        parser = self._parsers.setdefault(delta.index, self.how.parser(self.offer))
        events = parser.push(delta.text)
        first = delta.index not in self._begun
        self._take(delta, first=False)
        if delta.finish_reason is not None:
            events += parser.finish()
        gained = self._delta(events)
        shown = gained or first or delta.finish_reason or (self.logprobs and delta.logprobs)
        if not shown:
            return b""
        if first:
            begins_with_call = TOOL_CALLS in gained
            gained = {"role": "assistant", "content": None if begins_with_call else ""} | gained
        self._begun.add(delta.index)
        return self._prefix + b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            delta.index,
            _encode(gained),
            _encode(self._logprobs_of(delta)),
            _encode(_reason(delta, parser)),
        )

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        """See Answer.whole."""
        choices = []
        for delta in deltas:
            self._take(delta, first=False)
            parser = self.how.parser(self.offer)
            message = self._message([*parser.push(delta.text), *parser.finish()])
            choices.append(
                {
                    "index": delta.index,
                    "message": {"role": "assistant", "refusal": None} | message,
                    "logprobs": self._logprobs_of(delta),
                    "finish_reason": _reason(delta, parser),
                }
            )
        return self._body(choices)

    def _message(self, events: Sequence[Event]) -> dict[str, Any]:
        gained = self._delta(events)
        calls = gained.get(TOOL_CALLS)
        if not calls:
            return {"content": gained.get("content", "")}
        whole = [{key: value for key, value in call.items() if key != "index"} for call in calls]
        return {"content": gained.get("content"), TOOL_CALLS: whole}

    def _delta(self, events: Sequence[Event]) -> dict[str, Any]:
        """What a delta says: text and calls, those of one index joined."""
        text = "".join(event.text for event in events if isinstance(event, Content))
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, CallBegun):
                calls[event.index] = {
                    "index": event.index,
                    "id": self._new_id(),
                    "type": "function",
                    "function": {"name": event.name, "arguments": ""},
                }
            elif isinstance(event, CallArguments):
                empty = {"index": event.index, "function": {"arguments": ""}}
                call = calls.setdefault(event.index, empty)
                call["function"]["arguments"] += event.text
        gained: dict[str, Any] = {"content": text} if text else {}
        return gained | ({TOOL_CALLS: list(calls.values())} if calls else {})

    def _new_id(self) -> str:
        length = self.how.id_characters
        drawn = "".join(secrets.choice(_ALPHABET) for _ in range(length))
        return drawn if length < 20 else f"call_{drawn}"


def _reason(delta: Delta, parser: Parser) -> str | None:
    if delta.finish_reason is FinishReason.STOP and parser.calls:
        return TOOL_CALLS
    return delta.finish_reason
