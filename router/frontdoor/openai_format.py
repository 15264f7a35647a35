"""Answers of the OpenAI HTTP API: whole ones, and server-sent events built from a ready prefix."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import msgspec

from crossdock.model.text import TextModel
from crossdock.proto.errors import CrossdockError
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.http_errors import error_event
from crossdock.router.frontdoor.openai_logprobs import Offsets, token_name, top_by_name
from crossdock.router.frontdoor.openai_prompt import PromptAnswers

_encode = msgspec.json.encode
PLAIN_END = b',"logprobs":null,"finish_reason":null}]}\n\n'


@dataclass
class Answer(ABC):
    """One request's answer: what its chunks share, and what each index has sent so far."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]  # its `object`
    event_kind: ClassVar[str]
    lead: ClassVar[bytes]  # what stands before and after the text in an event that is only text
    tail: ClassVar[bytes]
    ends_at_once: ClassVar[bool] = True  # `end` waits for nothing

    names: TextModel  # how tokens are shown
    request_id: str
    created: int
    model: str
    n: int  # answers to each prompt
    logprobs: bool
    include_usage: bool
    fingerprint: str  # of model, weights and KV layout
    prompts: PromptAnswers  # what is said of them
    lengths: Sequence[int] = ()  # tokens of each, where an event tells the usage of its choice
    _usages: dict[int, inference_pb2.Usage] = field(default_factory=dict)
    _generated: Counter[int] = field(default_factory=Counter)  # tokens of an index, with `lengths`
    _begun: set[int] = field(default_factory=set)  # indexes of which something was sent
    _leads: dict[int, bytes] = field(default_factory=dict)  # what stands before an event's text

    @cached_property
    def _prefix(self) -> bytes:
        return self._begins(b'"usage":null,' if self.include_usage else b"")

    def _begins(self, usage: bytes) -> bytes:
        head = _encode(self._head(self.event_kind))[:-1]
        return b"data: " + head + b"," + usage + b'"choices":['

    def _before(self, index: int) -> bytes:
        """What stands before the choice in an event of this index."""
        if not self.lengths:
            return self._prefix
        prompt, completion = self.lengths[index // self.n], self._generated[index]
        return self._begins(b'"usage":%b,' % _encode(_usage(prompt, completion)))

    async def prepare(self, deltas: Sequence[Delta]) -> None:
        """Comes before `event` of any delta that says something of its prompt, and `whole`."""
        await self.prompts.prepare(deltas)

    def text_event(self, index: int, text: str) -> bytes | None:
        """The event of nothing but text, of an index that has begun; None where it is told
        otherwise."""
        lead = self._leads.get(index)
        if lead is None:
            return None
        return b"%b%b%b" % (lead, _encode(text), self.tail) if text else b""

    def event(self, delta: Delta) -> bytes:
        """Its server-sent event; empty where the delta holds nothing to show yet."""
        told = None if delta.finish_reason else self.text_event(delta.index, delta.text)
        if told is not None:
            return told
        first = delta.index not in self._begun
        self._take(delta, first)
        shown = delta.text or delta.finish_reason or (self.logprobs and delta.logprobs)
        if not shown and not first:
            return b""
        self._begun.add(delta.index)
        if not (self.logprobs or self.lengths):
            self._leads[delta.index] = self._prefix + b'{"index":%d,' % delta.index + self.lead
        before = self._before(delta.index)
        return before + b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            delta.index,
            self._gained(delta, first),
            _encode(self._logprobs_of(delta)),
            _encode(delta.finish_reason),
        )

    def last_events(self) -> bytes:
        """The end of the stream, after the usage where the client asked for it."""
        done = b"data: [DONE]\n\n"
        if not self.include_usage:
            return done
        body = self._head(self.event_kind) | {"choices": [], "usage": self._usage()}
        return b"data: " + _encode(body) + b"\n\n" + done

    async def told(self, deltas: Sequence[Delta]) -> bytes:
        """The answer of a request that was not streamed; one delta an index. Others run between
        them: one may be thousands of log-probabilities."""
        await self.prepare(deltas)
        choices = []
        for at, delta in enumerate(deltas):
            if at:
                await asyncio.sleep(0)
            choices.append(self._choice(delta))
        return self._body(choices)

    def _body(self, choices: Sequence[Any]) -> bytes:
        return _encode(self._head(self.kind) | {"choices": choices, "usage": self._usage()})

    def _choice(self, delta: Delta) -> dict[str, Any]:
        self._take(delta, first=True)
        return {
            "index": delta.index,
            **self._content(delta),
            "logprobs": self._logprobs_of(delta),
            "finish_reason": delta.finish_reason,
        }

    async def end(self) -> bytes:
        """`last_events`, likewise."""
        return self.last_events()

    def failed(self, error: CrossdockError) -> bytes:
        """The end of a stream that failed."""
        return error_event(error)

    def _head(self, kind: str) -> dict[str, Any]:
        id_ = f"{self.id_prefix}-{self.request_id}"
        return {
            "id": id_,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _take(self, delta: Delta, first: bool) -> None:
        if delta.usage is not None:
            self._usages[delta.index] = delta.usage
        if self.lengths:
            self._generated[delta.index] += len(delta.token_ids)
        if first and self.prompts.texts:
            delta.text = self.prompts.texts[delta.index // self.n] + delta.text

    def _usage(self) -> dict[str, Any]:
        """Summed over the choices, each prompt counted once."""
        firsts = [usage for index, usage in self._usages.items() if index % self.n == 0]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(usage.completion_tokens for usage in self._usages.values())
        cached = sum(usage.cached_tokens for usage in firsts)
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        return _usage(prompt, completion) | details

    def _logprobs_of(self, delta: Delta) -> dict[str, Any] | None:
        return self._tokens(delta.index, delta.logprobs) if self.logprobs else None

    @abstractmethod
    def _content(self, delta: Delta) -> dict[str, Any]:
        """What a whole choice says."""

    @abstractmethod
    def _gained(self, delta: Delta, first: bool) -> bytes:
        """What an event says, as a JSON key and its value."""

    @abstractmethod
    def _tokens(self, index: int, found: Sequence[inference_pb2.TokenLogprobs]) -> dict[str, Any]:
        """Logprobs of the next tokens of an index."""


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return counts | {"total_tokens": prompt + completion}


class ChatAnswer(Answer):
    """Of POST /v1/chat/completions."""

    id_prefix, kind, event_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    lead, tail = b'"delta":{"content":', b"}" + PLAIN_END

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def _body(self, choices: Sequence[Any]) -> bytes:
        body = self._head(self.kind) | {"choices": choices, "usage": self._usage()}
        return _encode(body | self.prompts.encoded(0))

    def _gained(self, delta: Delta, first: bool) -> bytes:
        if first:
            return b'"delta":{"role":"assistant","content":%b}' % _encode(delta.text)
        if not delta.text and delta.finish_reason is not None:
            return b'"delta":{}'
        return b'"delta":{"content":%b}' % _encode(delta.text)

    def _tokens(self, index: int, found: Sequence[inference_pb2.TokenLogprobs]) -> dict[str, Any]:
        def entry(item: inference_pb2.TokenLogprob) -> dict[str, Any]:
            return {
                "token": self.names.token_text(item.token_id),
                "logprob": item.logprob,
                "bytes": list(self.names.token_bytes(item.token_id)),
            }

        return {
            "content": [
                entry(item.chosen) | {"top_logprobs": [entry(top) for top in item.top]}
                for item in found
            ]
        }


@dataclass
class CompletionAnswer(Answer):
    """Of POST /v1/completions."""

    _offsets: dict[int, Offsets] = field(default_factory=dict)

    id_prefix, kind, event_kind = "cmpl", "text_completion", "text_completion"
    lead, tail = b'"text":', PLAIN_END

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text} | self.prompts.encoded(delta.index)

    def _gained(self, delta: Delta, first: bool) -> bytes:
        return b'"text":%b' % _encode(delta.text)

    def _tokens(self, index: int, found: Sequence[inference_pb2.TokenLogprobs]) -> dict[str, Any]:
        offsets, echoed = self._offsets.get(index), dict[str, list[Any]]()
        if offsets is None:
            texts = self.prompts.texts
            start = len(texts[index // self.n]) if texts else 0
            before = self.prompts.ends[index // self.n] if self.prompts.ends else ()
            offsets = self._offsets[index] = Offsets(self.names, start, before)
            echoed = self.prompts.columns(index)
        told: dict[str, list[Any]] = {
            "tokens": [token_name(self.names, item.chosen.token_id) for item in found],
            "token_logprobs": [item.chosen.logprob for item in found],
            "top_logprobs": [top_by_name(self.names, item, len(item.top)) for item in found],
            "text_offset": [offsets.next(item.chosen.token_id)[0] for item in found],
        }
        return {name: [*echoed.get(name, ()), *values] for name, values in told.items()}
