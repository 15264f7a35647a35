"""What an answer with tools says: its text, and its calls, as both doors tell them."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossdock.proto.types import FinishReason
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.tools.calls import CallArguments, CallBegun, Content, Event
from crossdock.router.frontdoor.tools.formats import ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.tools.parsers import Parser


@dataclass
class CallPiece:
    """What one call gained; id and name come with the first piece of it."""

    index: int  # of the answer's calls
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON, joined


@dataclass(frozen=True)
class Gained:
    """What a delta says once its calls are read."""

    text: str
    calls: tuple[CallPiece, ...]
    finish_reason: FinishReason | None


@dataclass
class Reading:
    """Reads the answers of one request, each index by itself, in deltas of whatever length."""

    offer: Offer
    how: ToolFormat
    _parsers: dict[int, Parser] = field(default_factory=dict)

    def take(self, delta: Delta) -> Gained:
        """The delta's text, and of calls what it settles."""
        parser = self._parsers.get(delta.index)
        if parser is None:
            parser = self._parsers[delta.index] = self.how.parser(self.offer)
        events, reason = parser.push(delta.text), delta.finish_reason
        if reason is not None:
            events += parser.finish()
            if reason is FinishReason.STOP and parser.calls:
                reason = FinishReason.TOOL_CALLS
        text = "".join(event.text for event in events if isinstance(event, Content))
        return Gained(text, self._calls(events), reason)

    def _calls(self, events: list[Event]) -> tuple[CallPiece, ...]:
        """Those of one index joined."""
        calls: dict[int, CallPiece] = {}
        for event in events:
            if isinstance(event, CallBegun):
                calls[event.index] = CallPiece(event.index, self.how.new_id(), event.name)
            elif isinstance(event, CallArguments):
                calls.setdefault(event.index, CallPiece(event.index)).arguments += event.text
        return tuple(calls.values())
