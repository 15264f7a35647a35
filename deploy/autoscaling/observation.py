"""What the autoscaler is told: of the cluster's spec once, of what happened at each decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crossdock.deploy.autoscaling.settings import AutoscaleSettings
from crossdock.proto.settings import no_entries
from crossdock.proto.types import Role
from crossdock.router.dispatch.lifecycle import Slo
from crossdock.router.dispatch.traffic import Traffic


@dataclass(frozen=True)
class StepTimes:
    """Seconds of engine steps: of one with prompts base + token * tokens + attention * (tokens *
    the context that they attend to), of one that decodes base + sequence * sequences + context *
    their tokens. A kind that nobody has measured is all 0."""

    prefill_base_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_attention_s: float = 0.0
    decode_base_s: float = 0.0
    decode_sequence_s: float = 0.0
    decode_context_s: float = 0.0

    @property
    def knows_prefill(self) -> bool:
        """Whether prompts were measured."""
        return bool(self.prefill_base_s or self.prefill_token_s)

    @property
    def knows_decode(self) -> bool:
        """Whether decoding was."""
        return bool(self.decode_base_s or self.decode_sequence_s)

    def or_else(self, before: StepTimes) -> StepTimes:
        """These, where they were measured, else those before."""
        prefill, decode = (
            self if self.knows_prefill else before,
            self if self.knows_decode else before,
        )
        return StepTimes(
            prefill.prefill_base_s,
            prefill.prefill_token_s,
            prefill.prefill_attention_s,
            decode.decode_base_s,
            decode.decode_sequence_s,
            decode.decode_context_s,
        )

    def prompt_s(self, tokens: float, cached: float, chunk_tokens: int) -> float:
        """Of all steps of a prompt of so many tokens, `cached` more of which are in the cache."""
        if tokens <= 0:
            return 0.0
        chunk = min(tokens, chunk_tokens)
        attended = tokens * (cached + tokens / 2 + chunk / 2)
        steps = max(1.0, tokens / chunk_tokens)
        return (
            self.prefill_base_s * steps
            + self.prefill_token_s * tokens
            + self.prefill_attention_s * attended
        )

    def step_s(self, sequences: float, context: float) -> float:
        """Of a step that decodes so many sequences of `context` tokens each."""
        each = self.decode_sequence_s + self.decode_context_s * context
        return self.decode_base_s + each * sequences


@dataclass(frozen=True)
class Pool:
    """What the spec says of a pool. `least` and `most` are equal where it is not autoscaled."""

    name: str
    role: Role
    least: int
    most: int
    model: str = ""  # "" where the cluster has one
    gpus: float = 1.0  # of a worker, as they count towards the bound
    max_batch: int = 64  # sequences that a worker decodes at once
    chunk_tokens: int = 256  # prompt tokens of one step of a worker
    start_s: float = 60.0  # presumed of a start until one was measured
    alike: str = ""  # pools that have it in common can exchange workers by role flips; "": none

    @property
    def autoscaled(self) -> bool:
        """Whether its size is to be decided."""
        return self.least < self.most


@dataclass(frozen=True)
class Config:
    """What does not change between two changes of the spec."""

    pools: tuple[Pool, ...]
    slo: Slo
    settings: AutoscaleSettings = field(default_factory=AutoscaleSettings)


@dataclass(frozen=True)
class PoolState:
    """How a pool stands at a decision."""

    target: int  # workers that it is to have now
    ready: int  # that serve
    starting: int = 0  # that do not yet: they start, or change their role
    queued_tokens: int = 0  # uncached prompt tokens that wait on its workers, all together
    running: int = 0  # sequences in their batches
    waiting: int = 0  # sequences that wait for a place there
    kv_tokens: int = 0  # that one worker has room for; 0: not known
    steps: StepTimes = field(default_factory=StepTimes)  # of its workers' mean
    started_s: tuple[float, ...] = ()  # starts that ended since the decision before, seconds each


@dataclass(frozen=True)
class Observation:
    """What happened since the decision before, `seconds` ago, and how the pools stand."""

    seconds: float
    pools: Mapping[str, PoolState]  # by name, each of the config's
    # By model, of all gateways together.
    traffic: Mapping[str, Traffic] = field(default_factory=no_entries)
