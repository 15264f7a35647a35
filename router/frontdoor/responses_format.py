"""Answers of POST /v1/responses: whole ones, and their server-sent events."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import msgspec

from crossdock.proto.errors import CrossdockError, InvalidRequest, Overloaded
from crossdock.proto.types import FinishReason
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.http_errors import error_body
from crossdock.router.frontdoor.responses_input import Item, new_id
from crossdock.router.frontdoor.tools.answer import ToolAnswer
from crossdock.router.frontdoor.tools.calls import CallArguments, CallBegun, Content, Event
from crossdock.router.frontdoor.tools.formats import NONE
from crossdock.router.frontdoor.tools.parsers import Parser

_encode = msgspec.json.encode


@dataclass
class ResponseAnswer(ToolAnswer):
    """One response: its output items as they grow, and the events that tell of it."""

    ends_at_once: ClassVar[bool] = False  # it is kept first

    about: Mapping[str, Any] = field(default_factory=dict)  # what it repeats of its request
    id: str = ""
    keep: Callable[[ResponseAnswer], Awaitable[bool]] | None = None  # whether it is kept
    token_ids: list[int] = field(default_factory=list)  # drawn, the one that ends it included
    output: list[Item] = field(default_factory=list)
    answered_by: str = ""  # the decode worker
    stored: bool = True
    _events: list[bytes] = field(default_factory=list)  # not sent yet
    _number: int = 0  # of the next event
    _open: bool = False  # the last item of the output is not done
    _unshown: list[dict[str, Any]] = field(default_factory=list)  # log-probabilities
    _finish: FinishReason | None = None

    @cached_property
    def _parser(self) -> Parser:
        return (self.how if self.offer.tools else NONE).parser(self.offer)

    # -- what the doors ask ------------------------------------------------------------------

    def event(self, delta: Delta) -> bytes:
        """See Answer.event."""
        self._begin()
        self._grow(delta)
        return self._sent()

    async def end(self) -> bytes:
        """See Answer.end: the response is kept before a client can go on from it."""
        await self._kept()
        self._emit(f"response.{self.status}", response=self.response(self.status))
        return self._sent()

    async def told(self, deltas: Sequence[Delta]) -> bytes:
        """See Answer.told."""
        for delta in deltas:
            self._grow(delta)
        await self._kept()
        return _encode(self.response(self.status))

    def failed(self, error: CrossdockError) -> bytes:
        """See Answer.failed."""
        self._begin()
        kind = "server_error"
        if isinstance(error, Overloaded | InvalidRequest):
            kind = "rate_limit_exceeded" if isinstance(error, Overloaded) else "invalid_prompt"
        told = {"code": kind, "message": error_body(error)["error"]["message"]}
        response = self.response("failed") | {"error": told}
        self._emit("response.failed", response=response)
        return self._sent()

    def response(self, status: str) -> dict[str, Any]:
        """The Response object as it is now."""
        over = status in ("completed", "incomplete")
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": self.output if status != "in_progress" else [],
            "usage": self._spent() if over else None,
            **self.about,
            "store": self.stored,
        }

    # -- how it grows ------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """Of the response, once it has ended."""
        return "incomplete" if self._finish is FinishReason.LENGTH else "completed"

    @property
    def shows_all(self) -> bool:
        """Whether the client has seen all that was drawn but for the token that ends a turn: not
        where a stop string, or another token that was to stop it, was left out."""
        last = self.token_ids[-1:]
        return self._finish is FinishReason.LENGTH or bool({*last} & {*self.names.eos_token_ids})

    def _begin(self) -> None:
        if self._number == 0:
            for kind in ("response.created", "response.in_progress"):
                self._emit(kind, response=self.response("in_progress"))

    def _grow(self, delta: Delta) -> None:
        self._take(delta, first=False)
        self.token_ids += delta.token_ids
        if self.logprobs and delta.logprobs:
            self._unshown += self._tokens(delta.index, delta.logprobs)["content"]
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        for event in events:
            self._item(event)
        if delta.finish_reason is not None:
            self._finish = delta.finish_reason
            self.answered_by = delta.timings.decode_worker if delta.timings else ""
            if not self.output:
                self._begin_message()
            self._close(self.status)

    def _item(self, event: Event) -> None:
        """Takes text, or something of a call."""
        if isinstance(event, Content):
            if not self._open or self.output[-1]["type"] != "message":
                self._begin_message()
            self._say(event.text)
        elif isinstance(event, CallBegun):
            self._close()
            item = {
                "id": new_id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": self.how.new_id(),
                "name": event.name,
                "arguments": "",
            }
            self._add(item)
        elif isinstance(event, CallArguments):
            item = self.output[-1]
            item["arguments"] += event.text
            kind = "response.function_call_arguments.delta"
            self._emit(kind, **self._where(item), delta=event.text)

    def _begin_message(self) -> None:
        self._close()
        item: Item = {"id": new_id("msg"), "type": "message", "status": "in_progress"}
        item |= {"role": "assistant", "content": []}
        self._add(item)
        part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        self._emit("response.content_part.added", **self._where(item, part=True), part=part)

    def _say(self, text: str) -> None:
        item = self.output[-1]
        part, gained = item["content"][0], self._unshown
        self._unshown = []
        part["text"] += text
        part["logprobs"] += gained
        kind = "response.output_text.delta"
        self._emit(kind, **self._where(item, part=True), delta=text, logprobs=gained)

    def _add(self, item: Item) -> None:
        self._open = True
        self.output.append(item)
        self._emit("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _close(self, status: str = "completed") -> None:
        """The last item, where it grows, grows no more."""
        if not self._open:
            return
        self._open, item = False, self.output[-1]
        item["status"] = status
        if item["type"] == "message":
            part, where = item["content"][0], self._where(item, part=True)
            part["logprobs"] += self._unshown
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            self._emit("response.output_text.done", **where, **told)
            self._emit("response.content_part.done", **where, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            self._emit("response.function_call_arguments.done", **self._where(item), **told)
        self._unshown = []
        self._emit("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _where(self, item: Item, part: bool = False) -> dict[str, Any]:
        where = {"item_id": item["id"], "output_index": len(self.output) - 1}
        return where | ({"content_index": 0} if part else {})

    async def _kept(self) -> None:
        if self.stored and self.keep is not None:
            self.stored = await self.keep(self)

    def _emit(self, kind: str, **told: Any) -> None:
        data = _encode({"type": kind, "sequence_number": self._number, **told})
        self._number += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))

    def _sent(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    def _spent(self) -> dict[str, Any]:
        usage = self._usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
