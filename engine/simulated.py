"""An engine without a model: its tokens, blocks and hand-offs are real, its time is from a profile.

The KV of a position is a sum over the whole prefix, each token weighted by its position; what is
added to it is the KV that lies before it in the pool. The next token is drawn from all the KV that
the sequence can reach. So a token drawn from a block that is wrong, missing or of another prefix is
a wrong token, here as in a model.
"""

# ruff: noqa: RUF009  (setting() is dataclasses.field with documentation)
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from crossdock.engine.contract import (
    WIRE_VERSION,
    Allocate,
    Engine,
    EngineConfig,
    EngineFacts,
    EngineSettings,
)
from crossdock.engine.profiles import Profile
from crossdock.engine.registry import kind_setting
from crossdock.kvcache.sequence import Chunk, PromptScores, SampledToken, StepPlan
from crossdock.model.config import load_config
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.errors import ConfigError
from crossdock.proto.memory import MemoryType, PoolMemory, region_sizes
from crossdock.proto.settings import setting
from crossdock.proto.types import SamplingParams
from crossdock.proto.v1 import worker_pb2

if TYPE_CHECKING:
    from crossdock.engine.grammars import Grammars, Mask

POSITION_BYTES = 8  # of KV
MORE_IDS = 8
TEXT_IDS = 32  # of the byte tokenizer: its end token, and what text is mostly made of
_MASK = 2**64 - 1

KV = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Settings(EngineSettings):
    """`engine: {kind: simulated, …}`"""

    kind: str = kind_setting("simulated")
    profile: Profile = setting(
        factory=Profile,
        doc=f"A simulated engine's pace: {', '.join(f'`{name}`' for name in Profile.NAMED)} "
        "or numbers.",
    )
    tokens_per_step: int = setting(
        1, "Tokens that a simulated engine draws for a sequence in one step.", low=1, high=8
    )

    def check_kv_dtype(self, dtype: str) -> None:
        if dtype != "auto":
            raise ConfigError("kv.dtype", f"{dtype!r} is no type of KV of a simulated engine: auto")


class SimulatedEngine(Engine):
    """See contract.Engine. Draws tokens below `drawn_ids`; calls `spend` with the seconds that a
    step takes: a virtual clock's moves time on."""

    def __init__(
        self,
        facts: EngineFacts,
        memory: PoolMemory,
        block_size: int,
        profile: Profile,
        drawn_ids: int,
        spend: Callable[[float], None] = time.sleep,
        load_text: Callable[[], TextModel] | None = None,
    ) -> None:
        self.facts, self.memory = facts, memory
        self.layout = worker_pb2.KVLayout(
            wire_version=WIRE_VERSION,
            engine="simulated",
            model_id=facts.model_id,
            weights_digest=facts.weights_digest,
            dtype="uint64",
            block_size=block_size,
            regions=region_sizes(memory.regions),
        )
        (blocks,) = memory.views
        self._kv: KV = blocks.view(np.uint64)  # [blocks, block_size]
        self._flat = self._kv.reshape(-1)
        self._block_size, self._drawn_ids = block_size, drawn_ids
        self._profile, self._spend = profile, spend
        self._load_text = load_text

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        masks = self._masks(plan)
        drawn = [self._compute(chunk, masks.get(i)) for i, chunk in enumerate(plan.chunks)]
        seconds = self._profile.step_s(plan)
        if seconds:
            self._spend(seconds)
        return drawn

    def close(self) -> None:
        """See contract.Engine.close."""
        if "_grammars" in vars(self):
            self._grammars.close()

    def kv_of(self, block_table: Sequence[int]) -> KV:
        """uint64 [blocks * block_size]: what these blocks hold."""
        return self._kv[list(block_table)].reshape(-1)

    def tokens_of(self, chunk: Chunk) -> int:
        """How many tokens, maybe none, this step draws after the chunk where there is room."""
        return self.facts.tokens_per_step

    @functools.cached_property
    def _grammars(self) -> Grammars:
        from crossdock.engine.grammars import Grammars

        assert self._load_text is not None, "an engine without a tokenizer takes no grammar"
        return Grammars(self._load_text)

    def _masks(self, plan: StepPlan) -> dict[int, Mask | None]:
        """By chunk, what may be drawn after it; None: nothing in this step."""
        constrained = {
            i: chunk.sequence
            for i, chunk in enumerate(plan.chunks)
            if chunk.sample and chunk.sequence.sampling.grammar is not None
        }
        if not constrained:
            return {}
        found = dict(self._grammars.begin(list(constrained.values())).collect())
        return {i: found.get(place) for place, i in enumerate(constrained)}

    def _compute(self, chunk: Chunk, mask: Mask | None) -> list[SampledToken]:
        sequence, end = chunk.sequence, chunk.end
        table, sampling = sequence.block_table, sequence.sampling
        self._write(table, chunk.start, sequence.token_ids[chunk.start : end])
        if chunk.scores is not None:
            self._score(table, sequence.token_ids, chunk.scores)
        count = self.tokens_of(chunk) if chunk.sample else 0
        if not count:
            return []
        seen = int((self.kv_of(table)[:end] * weights(0, end)).sum(dtype=np.uint64))
        if sampling.grammar is not None:
            return (
                [] if mask is None else [draw_allowed(seen, end, sampling, self._drawn_ids, mask)]
            )
        tokens = [draw(seen, end, sampling, self._drawn_ids)]
        room = len(table) * self._block_size
        for position in range(end, min(end + count - 1, room)):
            kv = self._write(table, position, [tokens[-1].token_id])
            seen = (seen + kv * int(weights(position, 1)[0])) & _MASK
            tokens.append(draw(seen, position + 1, sampling, self._drawn_ids))
        return tokens

    def _score(self, block_table: list[int], token_ids: list[int], scores: PromptScores) -> None:
        first, end = scores.first, scores.first + scores.count
        reached = self.kv_of(block_table)[: end - 1] * weights(0, end - 1)
        seen = reached.cumsum(dtype=np.uint64)[first - 1 :].tolist()
        vocab = self.facts.vocab_size
        for row, (before, token_id) in enumerate(zip(seen, token_ids[first:end])):
            logprob, rank, ids = score(before, token_id, scores.top, vocab)
            scores.logprobs[row], scores.ranks[row], scores.top_ids[row] = logprob, rank, ids
            scores.top_logprobs[row] = [rank_logprob(rank) for rank in range(1, scores.top + 1)]

    def _write(self, block_table: list[int], start: int, token_ids: list[int]) -> int:
        """Computes the KV of these tokens; returns that of the last."""
        size = self._block_size
        before = 0
        if start:
            before = int(self._flat[block_table[(start - 1) // size] * size + (start - 1) % size])
        if len(token_ids) == 1:  # most steps: without arrays of one element
            kv = (before + (token_ids[0] + 1) * int(weights(start, 1)[0])) & _MASK
            self._flat[block_table[start // size] * size + start % size] = kv
            return kv
        positions = np.arange(start, start + len(token_ids))
        slots = np.asarray(block_table)[positions // size] * size + positions % size
        written = np.uint64(before) + _terms(token_ids, start).cumsum(dtype=np.uint64)
        self._flat[slots] = written
        return int(written[-1])


def draw(seen: int, position: int, sampling: SamplingParams, drawn_ids: int) -> SampledToken:
    """The token of a position after KV whose weighted sum is `seen`; with the seed unless sampling
    is greedy. Other parameters change nothing."""
    token_id = drawn(seen, position, sampling, drawn_ids)
    if sampling.logprobs is None:
        return SampledToken(token_id)
    others = [((token_id + i) % drawn_ids, -1.0 - i) for i in range(sampling.logprobs)]
    return SampledToken(token_id, -1.0, tuple(others))


def score(seen: int, token_id: int, top: int, vocab: int) -> tuple[float, int, list[int]]:
    """Log-probability and rank of a token after KV whose weighted sum is `seen`, and the ids of the
    `top` most probable ones. By rank they are a ring that begins where `seen` says."""
    best = _mix(seen) % vocab
    rank = (token_id - best) % vocab + 1
    return rank_logprob(rank), rank, [(best + i) % vocab for i in range(top)]


def rank_logprob(rank: int) -> float:
    """The same for each rank, exact in float32."""
    return -rank / 64


def draw_allowed(
    seen: int, position: int, sampling: SamplingParams, drawn_ids: int, mask: Mask
) -> SampledToken:
    """As `draw`, of the first tokens that the mask allows: a few more than are drawn without one,
    so that there is something among them that ends what a grammar leaves open."""
    allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))[: drawn_ids + MORE_IDS]
    token_id = int(allowed[drawn(seen, position, sampling, len(allowed))])
    if sampling.logprobs is None:
        return SampledToken(token_id)
    others = [(int(allowed[i % len(allowed)]), -1.0 - i) for i in range(sampling.logprobs)]
    return SampledToken(token_id, -1.0, tuple(others))


def drawn(seen: int, position: int, sampling: SamplingParams, drawn_ids: int) -> int:
    """The token of a position after KV whose weighted sum is `seen`."""
    seed = 0 if sampling.greedy else sampling.seed
    return _mix(seen ^ _mix(position + seed)) % drawn_ids


def _terms(token_ids: Sequence[int], start: int) -> KV:
    """What each token adds to the KV, never 0."""
    ids = np.array(token_ids, dtype=np.uint64) + np.uint64(1)
    return ids * weights(start, len(token_ids))


def weights(start: int, count: int) -> KV:
    """uint64 [count] of the positions from `start` on."""
    return _table((start + count).bit_length())[start : start + count]


@functools.cache
def _table(bits: int) -> KV:
    """Odd numbers, unlike at every position."""
    positions = np.arange(1, 2**bits + 1, dtype=np.uint64)
    mixed = (positions * np.uint64(0x9E3779B97F4A7C15)) ^ (positions << np.uint64(29))
    return mixed | np.uint64(1)


def _mix(value: int) -> int:
    """splitmix64's finalizer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def memory_type(config: EngineConfig) -> MemoryType:
    """See registry.memory_type."""
    return "DRAM"


def create(config: EngineConfig, allocate: Allocate) -> SimulatedEngine:
    """See registry.create."""
    settings = config.engine
    assert isinstance(settings, Settings)
    settings.check_kv_dtype(config.kv_dtype)
    files = resolve(config.model, config.home)
    num_blocks = config.blocks_of(config.block_size * settings.profile.kv_bytes_per_token)
    block_bytes = config.block_size * POSITION_BYTES
    buffer, generations = allocate(num_blocks * block_bytes, num_blocks)
    memory = PoolMemory.block_major(buffer.ctypes.data, num_blocks, block_bytes, generations)
    model = load_config(files)
    facts = EngineFacts(
        files.model_id,
        files.digest,
        model.vocab_size,
        model.context_length,
        settings.tokens_per_step,
    )
    drawn_ids = TEXT_IDS if files.format == "bytes" else model.vocab_size
    return SimulatedEngine(
        facts,
        memory,
        config.block_size,
        settings.profile,
        drawn_ids,
        load_text=functools.partial(load_text, files),
    )
