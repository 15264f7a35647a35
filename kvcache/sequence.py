"""What is being generated, and what one engine step computes of it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from crossdock.proto.types import FinishReason, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One continuation of one prompt on one worker.

    Owns one reference on each block of `block_table` until the scheduler releases them.
    The KV of token_ids[:num_computed] is in the blocks.
    """

    sequence_id: str
    token_ids: list[int]  # prompt and generated tokens
    prompt_tokens: int  # of the client's prompt: generated = token_ids[prompt_tokens:]
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids
    root_hash: bytes = b""  # parent of the first of them
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # of num_computed, how many were found in the prefix cache
    num_sealed: int = 0  # of block_table, how many are full and hashed
    num_scored: int = 0  # of prompt_tokens, those whose log-probabilities are not asked for
    priority: int = 0
    arrival: float = 0.0
    yields: int = 0  # the chunks of its prompt wait for those of prompts with a smaller number

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn after its prompt."""
        return self.sampling.max_tokens > 0

    @property
    def reusable(self) -> int:
        """Tokens, from the first, whose KV need not be computed. The last one always is, since its
        logits give the next token; so is whatever precedes a token that is to be scored."""
        if self.sampling.prompt_logprobs is not None and self.num_scored < self.prompt_tokens:
            return min(max(0, self.num_scored - 1), self.num_tokens - 1)
        return self.num_tokens - 1

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens after the client's prompt, those of earlier attempts included."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def last_token_id(self) -> int:
        """The token drawn last, or the prompt's last; its KV is not computed yet."""
        return self.token_ids[-1]

    @property
    def num_uncomputed(self) -> int:
        """Tokens without KV: 1 while it decodes, more while its prompt is computed."""
        return len(self.token_ids) - self.num_computed


@dataclass(eq=False)
class PromptScores:
    """Log-probabilities of `count` tokens of a prompt from position `first` on, each given all
    that comes before it, with those of the `top` most probable tokens. A step fills them in."""

    first: int  # at least 1: nothing comes before the token at 0
    count: int
    top: int
    logprobs: np.ndarray = field(init=False)  # float32 [count]
    ranks: np.ndarray = field(init=False)  # int32 [count] among all tokens, from 1
    top_ids: np.ndarray = field(init=False)  # int32 [count, top] the most probable first
    top_logprobs: np.ndarray = field(init=False)  # float32 [count, top]

    def __post_init__(self) -> None:
        self.logprobs = np.zeros(self.count, np.float32)
        self.ranks = np.zeros(self.count, np.int32)
        self.top_ids = np.zeros((self.count, self.top), np.int32)
        self.top_logprobs = np.zeros((self.count, self.top), np.float32)

    @classmethod
    def asked(cls, sequence: Sequence, start: int, end: int) -> PromptScores | None:
        """What the logits of a sequence's tokens [start, end) are to give; None: nothing."""
        top = sequence.sampling.prompt_logprobs
        if top is None:
            return None
        first = max(start + 1, sequence.num_scored)
        count = min(end + 1, sequence.prompt_tokens) - first
        return cls(first, count, top) if count > 0 else None


@dataclass(frozen=True)
class Chunk:
    """The part of one sequence that one step computes: token_ids[start : start + length]."""

    sequence: Sequence
    start: int
    length: int
    sample: bool  # its last token is the sequence's last: draw what follows
    scores: PromptScores | None = None  # of its tokens' successors in the prompt

    @property
    def end(self) -> int:
        return self.start + self.length

    @classmethod
    def of(cls, sequence: Sequence, start: int, length: int) -> Chunk:
        """With what the sequence asks for after these tokens, and of them."""
        last = start + length == sequence.num_tokens
        scores = PromptScores.asked(sequence, start, start + length)
        return cls(sequence, start, length, last and sequence.draws, scores)


class StepWork(NamedTuple):
    """What the time of a step goes by."""

    tokens: int  # of prompts
    attention: int  # tokens × the context up to their end, summed over the chunks of prompts
    sequences: int  # that decode
    context: int  # tokens, of those


@dataclass(frozen=True)
class StepPlan:
    """What one engine step runs: any mix of prefill chunks and decode tokens (length 1)."""

    chunks: tuple[Chunk, ...]

    @cached_property
    def work(self) -> StepWork:
        """Prompts and decodes apart."""
        tokens = attention = sequences = context = 0
        for chunk in self.chunks:
            length, end = chunk.length, chunk.start + chunk.length
            if length > 1:
                tokens += length
                attention += length * end
            else:
                sequences += 1
                context += end
        return StepWork(tokens, attention, sequences, context)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes, over all chunks."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True)
class SampledToken:
    """A token drawn after a chunk with `sample` set. Logprobs only where asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


Finish = tuple[FinishReason, str]  # and the stop token id if one ended the sequence


def take_tokens(
    sequence: Sequence, tokens: list[SampledToken], context_length: int
) -> tuple[list[SampledToken], Finish | None]:
    """Appends what a step drew, up to the token that ends the sequence: what follows that is
    dropped. Returns what was taken, and how the sequence ended if it did."""
    for count, token in enumerate(tokens, 1):
        sequence.token_ids.append(token.token_id)
        finish = finish_of(sequence, context_length)
        if finish is not None:
            return tokens[:count], finish
    return tokens, None


def finish_of(sequence: Sequence, context_length: int) -> Finish | None:
    """Whether the last token ends the sequence. One that draws none ends with its prompt."""
    token_id, sampling = sequence.last_token_id, sequence.sampling
    enough = sequence.num_generated >= sampling.min_tokens
    if enough and token_id in sampling.stop_token_ids:
        return FinishReason.STOP, str(token_id)
    # A grammar that is complete allows nothing but the end, so that goes before min_tokens.
    may_end = not sampling.ignore_eos and (enough or sampling.grammar is not None)
    if may_end and token_id in sequence.eos_token_ids:
        return FinishReason.STOP, ""
    if sequence.num_generated >= sampling.max_tokens or sequence.num_tokens >= context_length:
        return FinishReason.LENGTH, ""
    return None
