"""Answers of the OpenAI HTTP API: whole ones, and server-sent events built from a ready prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from crossdock.proto.errors import CrossdockError, InvalidRequest, NotFound, Overloaded
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.request import Delta

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode


class TokenNames(Protocol):
    """How single tokens are shown."""

    def token_text(self, token_id: int) -> str:
        """One token as text."""

    def token_bytes(self, token_id: int) -> bytes:
        """One token as bytes."""


@dataclass(frozen=True)
class Head:
    """What all chunks of one answer share."""

    id: str
    created: int
    model: str
    chat: bool
    include_usage: bool = False

    @property
    def kind(self) -> str:
        """The `object` of an answer."""
        return "chat.completion" if self.chat else "text_completion"

    def event_prefix(self) -> bytes:
        """The bytes before the choices of every event."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        usage = b'"usage":null,' if self.include_usage else b""
        return b"data: " + _encode(head)[:-1] + b"," + usage + b'"choices":['


def chat_event(
    prefix: bytes, delta: Delta, first: bool, names: TokenNames, logprobs: bool
) -> bytes:
    """One server-sent event of a chat answer."""
    content = _encode(delta.text)
    opening = b'{"role":"assistant","content":' if first else b'{"content":'
    if not first and not delta.text and delta.finish_reason is not None:
        opening, content = b"{", b""
    found = _encode(chat_logprobs(delta.logprobs, names)) if logprobs else b"null"
    return b"%b{%b%d,%b%b%b},%b%b,%b%b}]}\n\n" % (
        prefix,
        b'"index":',
        delta.index,
        b'"delta":',
        opening,
        content,
        b'"logprobs":',
        found,
        b'"finish_reason":',
        _finish(delta.finish_reason),
    )


def completion_event(
    prefix: bytes, delta: Delta, offset: int, names: TokenNames, logprobs: bool
) -> bytes:
    """One server-sent event of a completion; `offset` is where its text starts in the whole."""
    found = b"null"
    if logprobs:
        found = _encode(completion_logprobs(delta.logprobs, names, offset))
    return b"%b{%b%d,%b%b,%b%b,%b%b}]}\n\n" % (
        prefix,
        b'"index":',
        delta.index,
        b'"text":',
        _encode(delta.text),
        b'"logprobs":',
        found,
        b'"finish_reason":',
        _finish(delta.finish_reason),
    )


def usage_event(head: Head, usage: dict[str, Any]) -> bytes:
    """The event after the last one, when the client asked for usage."""
    kind = "chat.completion.chunk" if head.chat else "text_completion"
    body = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
    return b"data: " + _encode(body | {"choices": [], "usage": usage}) + b"\n\n"


def error_event(error: CrossdockError) -> bytes:
    """An error after the answer has begun."""
    return b"data: " + _encode(error_body(error)) + b"\n\n"


def whole_answer(
    head: Head, deltas: Sequence[Delta], names: TokenNames, logprobs: bool, usage: Any
) -> bytes:
    """The answer of a request that was not streamed; one delta an index."""
    choices = []
    for delta in deltas:
        choice: dict[str, Any] = {"index": delta.index}
        if head.chat:
            choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
            found: Any = chat_logprobs(delta.logprobs, names) if logprobs else None
        else:
            choice["text"] = delta.text
            found = completion_logprobs(delta.logprobs, names, 0) if logprobs else None
        choice["logprobs"] = found
        choice["finish_reason"] = delta.finish_reason and delta.finish_reason.value
        choices.append(choice)
    body = {"id": head.id, "object": head.kind, "created": head.created, "model": head.model}
    return _encode(body | {"choices": choices, "usage": usage})


def usage_of(usages: dict[int, inference_pb2.Usage], n: int) -> dict[str, Any]:
    """Summed over the choices, each prompt counted once."""
    firsts = [usage for index, usage in usages.items() if index % n == 0]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    completion = sum(usage.completion_tokens for usage in usages.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


def chat_logprobs(
    found: Sequence[inference_pb2.TokenLogprobs], names: TokenNames
) -> dict[str, Any]:
    """Logprobs as /v1/chat/completions has them."""

    def entry(item: inference_pb2.TokenLogprob) -> dict[str, Any]:
        return {
            "token": names.token_text(item.token_id),
            "logprob": item.logprob,
            "bytes": list(names.token_bytes(item.token_id)),
        }

    return {
        "content": [
            entry(item.chosen) | {"top_logprobs": [entry(top) for top in item.top]}
            for item in found
        ]
    }


def completion_logprobs(
    found: Sequence[inference_pb2.TokenLogprobs], names: TokenNames, offset: int
) -> dict[str, Any]:
    """Logprobs as /v1/completions has them."""
    tokens = [names.token_text(item.chosen.token_id) for item in found]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [item.chosen.logprob for item in found],
        "top_logprobs": [
            {names.token_text(t.token_id): t.logprob for t in item.top} for item in found
        ],
        "text_offset": offsets,
    }


def error_body(error: CrossdockError) -> dict[str, Any]:
    """OpenAI's shape. `code` is the name of the error's class in Crossdock's own tree."""
    kind = "server_error"
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


def _finish(reason: FinishReason | None) -> bytes:
    return b"null" if reason is None else b'"%b"' % reason.value.encode()
