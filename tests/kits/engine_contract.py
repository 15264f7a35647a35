"""What every kind of engine holds to: tests of a fixture `engine`, made by `make` with heads and
blocks of its own size. Who has one imports them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crossdock.engine import registry
from crossdock.engine.contract import Engine, EngineConfig
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.proto.memory import region_sizes
from crossdock.proto.types import SamplingParams

BLOCKS = 12


def make(kind: str, model: object, args: object = None, **settings: object) -> Engine:
    """args: of a vllm engine."""
    own = {} if args is None else {"args": args}
    config = EngineConfig(
        engine=registry.settings_of(kind)(kind=kind, **own),  # type: ignore[arg-type]
        model=str(model),
        **({"block_size": 8, "kv_blocks": BLOCKS} | settings),  # type: ignore[arg-type]
    )

    def allocate(nbytes: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        buffers.append(np.zeros(nbytes, np.uint8))
        return buffers[-1], np.zeros(num_blocks, np.int64)

    buffers: list[np.ndarray] = []
    engine = registry.create(config, allocate)
    engine.buffers = buffers  # type: ignore[attr-defined]
    return engine


def sequence(ids: list[int], *blocks: int) -> Sequence:
    params = SamplingParams(temperature=0.0)
    return Sequence("s", list(ids), len(ids), params, block_table=list(blocks))


def continued(engine: Engine, one: Sequence, tokens: int) -> list[int]:
    """Runs the prompt in two chunks, then token by token."""
    half = one.num_tokens // 2
    assert engine.run(StepPlan((Chunk(one, 0, half, False),))) == [[]]
    chunk = Chunk(one, half, one.num_tokens - half, True)
    for _ in range(tokens):
        ((token,),) = engine.run(StepPlan((chunk,)))
        one.token_ids.append(token.token_id)
        chunk = Chunk(one, one.num_tokens - 1, 1, True)
    return one.token_ids[-tokens:]


def prompt_for(engine: Engine) -> list[int]:
    """Two blocks and a part of a third."""
    return [(7 * i) % 200 + 3 for i in range(2 * engine.layout.block_size + 5)]


def test_facts_layout_and_memory_agree(engine: Engine) -> None:
    facts, layout, memory = engine.facts, engine.layout, engine.memory
    assert (layout.model_id, layout.weights_digest) == (facts.model_id, facts.weights_digest)
    assert memory.num_blocks == BLOCKS
    assert layout.regions == region_sizes(memory.regions)
    assert [part.shape for part in memory.views] == [
        (BLOCKS, each.nbytes) for each in memory.regions
    ]
    assert facts.vocab_size > 256 and facts.context_length == 2048 and facts.tokens_per_step == 1
    engine.warmup()
    assert not any(part.any() for part in memory.views)


def test_tokens_depend_on_the_prefix_and_on_the_kv_in_its_blocks(engine: Engine) -> None:
    prompt = prompt_for(engine)
    right = continued(engine, sequence(prompt, 3, 1, 2, 5), 6)
    assert continued(engine, sequence(prompt, 8, 9, 10, 11), 6) == right
    assert continued(engine, sequence([*prompt[:-1], 9], 3, 1, 2, 5), 6) != right
    # The same, on KV that was carried from one pool's blocks to others, and on KV that was not.
    moved, parts = sequence(prompt, 0, 4, 6, 7), engine.memory.views
    for part in parts:
        part[[0, 4, 6]] = part[[8, 9, 10]]
    ((token,),) = engine.run(StepPlan((Chunk(moved, len(prompt) - 1, 1, True),)))
    assert token.token_id == right[0]
    after = [part[6].copy() for part in parts]
    for part in parts:
        part[4] = 0
    ((token,),) = engine.run(StepPlan((Chunk(moved, len(prompt) - 1, 1, True),)))
    assert token.token_id != right[0] or any(
        (part[6] != before).any() for part, before in zip(parts, after, strict=True)
    )  # of the last position


def scored(engine: Engine, blocks: tuple[int, ...], *lengths: int) -> list[tuple[Any, ...]]:
    prompt, size = prompt_for(engine), engine.layout.block_size
    one = sequence(prompt, *blocks)
    one.sampling = SamplingParams(max_tokens=0, prompt_logprobs=2)
    found: list[tuple[Any, ...]] = []
    for length in lengths:
        other = Chunk(sequence(prompt[:size], 11), 0, size, True)
        chunk = Chunk.of(one, one.num_computed, length)
        one.num_computed += length
        _, drawn = engine.run(StepPlan((other, chunk)))
        assert drawn == [] and other.scores is None
        if (scores := chunk.scores) is not None:
            assert scores.first == len(found) + 1
            assert scores.top_ids.shape == scores.top_logprobs.shape == (scores.count, 2)
            tops = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist())
            found += zip(scores.logprobs.tolist(), scores.ranks.tolist(), tops)
    return found


def test_prompts_are_scored_alike_in_any_chunks_and_blocks(engine: Engine) -> None:
    """Each token by all that comes before it and nothing else; the first by nothing."""
    length, size = len(prompt_for(engine)), engine.layout.block_size
    whole = scored(engine, (3, 1, 2), length)
    assert len(whole) == length - 1
    parts = scored(engine, (8, 9, 10), size, 5, size - 1, 1)
    for found in (parts, scored(engine, (3, 1, 2), 1, length - 1)):
        for (logprob, rank, (ids, values)), right in zip(found, whole, strict=True):
            assert (rank, ids) == (right[1], right[2][0])
            assert [logprob, *values] == pytest.approx([right[0], *right[2][1]], abs=1e-4)
            assert logprob <= values[0] and values == sorted(values, reverse=True)
            assert (rank == 1) == (logprob == values[0])
