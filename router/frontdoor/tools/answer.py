"""Answers of a chat in which the model may call tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from crossdock.proto.types import FinishReason
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.openai_format import ChatAnswer
from crossdock.router.frontdoor.tools.formats import ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.tools.reading import CallPiece, Gained, Reading

TOOL_CALLS = FinishReason.TOOL_CALLS.value  # of an answer that calls
_encode = msgspec.json.encode


@dataclass
class ToolAnswer(ChatAnswer):
    """Of POST /v1/chat/completions with tools: text that is a call becomes one."""

    offer: Offer = field(kw_only=True)
    how: ToolFormat = field(kw_only=True)
    _reading: Reading = field(init=False)

    def __post_init__(self) -> None:
        self._reading = Reading(self.offer, self.how)

    def event(self, delta: Delta) -> bytes:
        """See Answer.event."""
        first = delta.index not in self._begun
        self._take(delta, first=False)
        said = self._reading.take(delta)
        gained = _delta(said)
        shown = gained or first or said.finish_reason or (self.logprobs and delta.logprobs)
        if not shown:
            return b""
        if first:
            begins_with_call = TOOL_CALLS in gained
            gained = {"role": "assistant", "content": None if begins_with_call else ""} | gained
        self._begun.add(delta.index)
        before = self._before(delta.index)
        return before + b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            delta.index,
            _encode(gained),
            _encode(self._logprobs_of(delta)),
            _encode(said.finish_reason),
        )

    def _choice(self, delta: Delta) -> dict[str, Any]:
        self._take(delta, first=False)
        said = self._reading.take(delta)
        return {
            "index": delta.index,
            "message": {"role": "assistant", "refusal": None} | _message(said),
            "logprobs": self._logprobs_of(delta),
            "finish_reason": said.finish_reason,
        }


def _message(said: Gained) -> dict[str, Any]:
    if not said.calls:
        return {"content": said.text}
    whole = [{key: value for key, value in _call(c).items() if key != "index"} for c in said.calls]
    return {"content": said.text or None, TOOL_CALLS: whole}


def _delta(said: Gained) -> dict[str, Any]:
    gained: dict[str, Any] = {"content": said.text} if said.text else {}
    return gained | ({TOOL_CALLS: [_call(call) for call in said.calls]} if said.calls else {})


def _call(piece: CallPiece) -> dict[str, Any]:
    if not piece.id:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
