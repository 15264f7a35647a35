"""What a client gets back, as plain frozen data, and how it is read off the wire."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from crossdock.proto.convert import FINISH_FROM_PB
from crossdock.proto.types import LIFE_CYCLE, FinishReason
from crossdock.proto.v1 import inference_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; `cached_tokens` of the prompt were found in a KV cache, not computed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds since the gateway received the request; an event it never reached is absent."""

    events: dict[str, float]
    prefill_worker: str = ""
    decode_worker: str = ""
    transferred_bytes: int = 0
    transferred_blocks: int = 0
    recomputed_tokens: int = 0
    late_bytes: int = 0  # of transferred_bytes, what moved after token 0
    predicted_ttft: float | None = None  # from routed to first_token; None: nothing was measured

    @property
    def ttft(self) -> float | None:
        """Seconds from received to token 0 at the gateway."""
        return self.events.get("first_token")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms, of the distribution before penalties and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), the likeliest first
    rank: int = 0  # of a prompt's token: among all tokens, from 1; else 0


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. In a chunk, what it gained: id and name come with the first of a call."""

    id: str
    name: str
    arguments: str  # JSON, whole only where the answer is not cut short
    index: int = 0  # of the answer's calls


@dataclass(frozen=True)
class Completion:
    """One continuation of the prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt, from its second token on
    timings: Timings | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Chunk(Completion):
    """What one message of a stream adds to continuation `index`.

    finish_reason, usage and timings are set in the last chunk of an index.
    """

    request_id: str = ""
    usage: Usage | None = None


@dataclass(frozen=True)
class Result:
    """A finished request; the properties are those of its first continuation."""

    request_id: str
    model: str
    completions: tuple[Completion, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first completion."""
        return self.completions[0].token_ids

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Of the first completion, where tools were offered."""
        return self.completions[0].tool_calls

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.completions[0].finish_reason

    @property
    def stop_reason(self) -> str:
        """The stop string or token that ended the first completion."""
        return self.completions[0].stop_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Of the first completion's tokens, where they were asked for."""
        return self.completions[0].logprobs

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Of the prompt's tokens from the second on, where they were asked for."""
        return self.completions[0].prompt_logprobs

    @property
    def timings(self) -> Timings | None:
        """Of the first completion, in seconds."""
        return self.completions[0].timings


@dataclass(frozen=True)
class ModelInfo:
    """A model that the cluster serves."""

    id: str
    context_length: int  # tokens
    aliases: tuple[str, ...] = ()  # other names that requests may have for it


def read_chunk(message: pb.GenerateResponse) -> Chunk:
    """A piece of a stream from its message."""
    usage = read_as(Usage, message.usage) if message.HasField("usage") else None
    return read_as(Chunk, message, usage=usage, **_continuation(message))


def read_result(message: pb.GenerateUnaryResponse) -> Result:
    """A whole answer from its message."""
    messages = sorted(message.completions, key=lambda each: each.index)
    completions = tuple(read_as(Completion, each, **_continuation(each)) for each in messages)
    return read_as(Result, message, completions=completions, usage=read_as(Usage, message.usage))


def read_models(message: pb.ListModelsResponse) -> list[ModelInfo]:
    """The models from their message."""
    return [read_as(ModelInfo, model, aliases=tuple(model.aliases)) for model in message.models]


def read_as(kind: type[T], message: Any, **known: Any) -> T:
    """A `kind`, a dataclass, whose fields `message` has by their names, but for the known ones."""
    names = (about.name for about in fields(kind))  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names if name not in known}, **known)


def _continuation(message: pb.GenerateResponse | pb.Completion) -> dict[str, Any]:
    """What a chunk and a completion have in common and the message has in another form."""
    return {
        "token_ids": tuple(message.token_ids),
        "logprobs": tuple(map(_logprobs, message.logprobs)),
        "prompt_logprobs": tuple(map(_logprobs, message.prompt_logprobs)),
        "finish_reason": FINISH_FROM_PB.get(message.finish_reason),
        "tool_calls": tuple(read_as(ToolCall, call) for call in message.tool_calls),
        "timings": _timings(message.timings) if message.HasField("timings") else None,
    }


def _timings(message: pb.Timings) -> Timings:
    events = {name: getattr(message, name) for name in LIFE_CYCLE if message.HasField(name)}
    predicted = message.predicted_ttft if message.HasField("predicted_ttft") else None
    return read_as(Timings, message, events=events, predicted_ttft=predicted)


def _logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple((other.token_id, other.logprob) for other in message.top)
    return read_as(TokenLogprobs, message.chosen, top=top)
