"""Plain types shared by every layer: no torch, no ray, no gRPC."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from crossdock.proto.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_N = 16
MAX_GRAMMAR_BYTES = 128 << 10
# Sampling parameters that are numbers, from the least to the most.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (-(2**63), 2**64 - 1),
}
LEAST_MAX_TOKENS = "must be at least 1, or 0 where something of the prompt is asked for"

# The life-cycle events of a request after `received`, in the order in which they happen: one name
# each in spans, metrics, logs and reports.
LIFE_CYCLE = (
    "admitted",
    "routed",
    "prefill_queued",
    "prefill_started",
    "first_token",
    "ticket_offered",
    "decode_queued",
    "reserved",
    "pulled",
    "fenced",
    "joined",
    "last_token",
    "finished",
)


class Role(enum.StrEnum):
    """What a worker does: which scheduler it runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class FinishReason(enum.StrEnum):
    """Why a sequence ended; values as in the OpenAI API where it has them."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    TOOL_CALLS = "tool_calls"  # at the front door: it ended well, and it calls


class GrammarKind(enum.StrEnum):
    """How the text of a grammar is read."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any JSON object; no text
    REGEX = "regex"
    LARK = "lark"  # llguidance's variant of it
    CHOICE = "choice"  # a JSON list of strings


@dataclass(frozen=True)
class Grammar:
    """What an answer must match, from its first token to its end."""

    kind: GrammarKind
    text: str = ""

    def validate(self, field: str) -> None:
        """Raises InvalidRequest, naming `field`, for what is too large to be looked into."""
        size = len(self.text.encode("utf-8", "replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(field, f"{size} bytes", f"at most {MAX_GRAMMAR_BYTES} bytes")
        if not self.text.strip() and self.kind is not GrammarKind.JSON_OBJECT:
            raise InvalidRequest(field, self.text, "must not be empty")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Penalties and filters apply in the order of the fields."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Temperature 0: the most probable token, whatever the seed."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens of the sequence change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidRequest naming the first field that is out of its range."""
        for name, (low, high) in RANGES.items():
            _within(name, getattr(self, name), low, high)
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequest("top_p", self.top_p, "must be in (0, 1]")
        _at_most("logit_bias", self.logit_bias, MAX_LOGIT_BIAS, "entries")
        for token_id, bias in self.logit_bias.items():
            _within("logit_bias", token_id, 0, vocab_size - 1)
            _within(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        _at_most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, "token ids")
        for token_id in self.stop_token_ids:
            _within("stop_token_ids", token_id, 0, vocab_size - 1)
        _at_most("stop", self.stop, MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                limit = f"each must have 1 to {MAX_STOP_CHARACTERS} characters"
                raise InvalidRequest("stop", text, limit)
        if self.max_tokens < 0:
            raise InvalidRequest("max_tokens", self.max_tokens, LEAST_MAX_TOKENS)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _within("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None:
            self.grammar.validate("grammar")
            if self.ignore_eos:
                limit = "an answer that must match a grammar ends when it does"
                raise InvalidRequest("ignore_eos", True, limit)


@dataclass(frozen=True)
class WorkerEndpoint:
    """Where one incarnation of a worker is reached. Two incarnations are two peers."""

    name: str
    pool: str
    role: Role
    address: str
    incarnation: str  # hexadecimal, 32 characters
    revision: str = ""
    model: str = ""  # its name where a cluster has several; gateways are told it


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # nor is NaN
        raise InvalidRequest(name, value, f"must be from {low} to {high}")


def _at_most(name: str, values: object, limit: int, what: str) -> None:
    count = len(values)  # type: ignore[arg-type]
    if count > limit:
        raise InvalidRequest(name, f"{count} {what}", f"at most {limit} {what}")
