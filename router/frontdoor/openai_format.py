"""Answers of the OpenAI HTTP API: whole ones, and server-sent events built from a ready prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import msgspec

from crossdock.model.text import TextModel
from crossdock.proto.errors import (
    CrossdockError,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthenticated,
)
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.access_errors import access_error_body

_encode = msgspec.json.encode


@dataclass
class Answer(ABC):
    """One request's answer: what its chunks share, and what each index has sent so far."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]  # its `object`
    event_kind: ClassVar[str]

    names: TextModel  # how tokens are shown
    request_id: str
    created: int
    model: str
    n: int  # answers to each prompt
    logprobs: bool
    include_usage: bool
    echo: Sequence[str] = ()  # by prompt, text to put before its answers
    _usages: dict[int, inference_pb2.Usage] = field(default_factory=dict)
    _sent: dict[int, int] = field(default_factory=dict)  # index -> characters

    @cached_property
    def _prefix(self) -> bytes:
        usage = b'"usage":null,' if self.include_usage else b""
        head = _encode(self._head(self.event_kind))[:-1]
        return b"data: " + head + b"," + usage + b'"choices":['

    def event(self, delta: Delta) -> bytes:
        """Its server-sent event; empty where the delta holds nothing to show yet."""
        first = delta.index not in self._sent
        self._take(delta, first)
        shown = delta.text or delta.finish_reason or (self.logprobs and delta.logprobs)
        if not shown and not first:
            return b""
        offset = self._sent.get(delta.index, 0)
        self._sent[delta.index] = offset + len(delta.text)
        return self._prefix + b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            delta.index,
            self._gained(delta, first),
            _encode(self._logprobs_of(delta, offset)),
            _encode(delta.finish_reason),
        )

    def last_events(self) -> bytes:
        """The end of the stream, after the usage where the client asked for it."""
        done = b"data: [DONE]\n\n"
        if not self.include_usage:
            return done
        body = self._head(self.event_kind) | {"choices": [], "usage": self._usage()}
        return b"data: " + _encode(body) + b"\n\n" + done

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        """The answer of a request that was not streamed; one delta an index."""
        choices = []
        for delta in deltas:
            self._take(delta, first=True)
            choices.append(
                {
                    "index": delta.index,
                    **self._content(delta),
                    "logprobs": self._logprobs_of(delta, 0),
                    "finish_reason": delta.finish_reason,
                }
            )
        return _encode(self._head(self.kind) | {"choices": choices, "usage": self._usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        id_ = f"{self.id_prefix}-{self.request_id}"
        return {"id": id_, "object": kind, "created": self.created, "model": self.model}

    def _take(self, delta: Delta, first: bool) -> None:
        if delta.usage is not None:
            self._usages[delta.index] = delta.usage
        if first and self.echo:
            delta.text = self.echo[delta.index // self.n] + delta.text

    def _usage(self) -> dict[str, Any]:
        """Summed over the choices, each prompt counted once."""
        firsts = [usage for index, usage in self._usages.items() if index % self.n == 0]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(usage.completion_tokens for usage in self._usages.values())
        cached = sum(usage.cached_tokens for usage in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _logprobs_of(self, delta: Delta, offset: int) -> dict[str, Any] | None:
        return self._tokens(delta.logprobs, offset) if self.logprobs else None

    @abstractmethod
    def _content(self, delta: Delta) -> dict[str, Any]:
        """What a whole choice says."""

    @abstractmethod
    def _gained(self, delta: Delta, first: bool) -> bytes:
        """What an event says, as a JSON key and its value."""

    @abstractmethod
    def _tokens(self, found: Sequence[inference_pb2.TokenLogprobs], offset: int) -> dict[str, Any]:
        """Logprobs of tokens whose text begins `offset` characters into the whole."""


class ChatAnswer(Answer):
    """Of POST /v1/chat/completions."""

    id_prefix, kind, event_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def _gained(self, delta: Delta, first: bool) -> bytes:
        if first:
            return b'"delta":{"role":"assistant","content":%b}' % _encode(delta.text)
        if not delta.text and delta.finish_reason is not None:
            return b'"delta":{}'
        return b'"delta":{"content":%b}' % _encode(delta.text)

    def _tokens(self, found: Sequence[inference_pb2.TokenLogprobs], offset: int) -> dict[str, Any]:
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


class CompletionAnswer(Answer):
    """Of POST /v1/completions."""

    id_prefix, kind, event_kind = "cmpl", "text_completion", "text_completion"

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _gained(self, delta: Delta, first: bool) -> bytes:
        return b'"text":%b' % _encode(delta.text)

    def _tokens(self, found: Sequence[inference_pb2.TokenLogprobs], offset: int) -> dict[str, Any]:
        text_of = self.names.token_text
        tokens = [text_of(item.chosen.token_id) for item in found]
        return {
            "tokens": tokens,
            "token_logprobs": [item.chosen.logprob for item in found],
            "top_logprobs": [{text_of(t.token_id): t.logprob for t in item.top} for item in found],
            "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset))[: len(tokens)],
        }


def error_event(error: CrossdockError) -> bytes:
    """An error after the answer has begun."""
    return b"data: " + _encode(error_body(error)) + b"\n\n"


def error_body(error: CrossdockError) -> dict[str, Any]:
    """OpenAI's shape. `code` is the name of the error's class in Crossdock's own tree."""
    kind = "server_error"
    if isinstance(error, Unauthenticated | Forbidden | RateLimited):
        return access_error_body(error)
    if isinstance(error, InvalidRequest | NotFound):
        kind = "invalid_request_error"
    elif isinstance(error, Overloaded):
        kind = "rate_limit_error"
    code = "model_not_found" if isinstance(error, NotFound) else _code(type(error).__name__)
    param = error.field if isinstance(error, InvalidRequest) else None
    if isinstance(error, NotFound):
        param = "model"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def _code(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
