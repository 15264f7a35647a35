"""Tests of an engine of two ranks, which test_ranks.py runs in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
from engine_contract import (  # noqa: F401  (tests)
    BLOCKS,
    continued,
    prompt_for,
    sequence,
    test_facts_layout_and_memory_agree,
    test_prompts_are_scored_alike_in_any_chunks_and_blocks,
)
from engines_kit import simulated

from crossdock.engine import registry
from crossdock.engine.contract import Engine, EngineConfig
from crossdock.kvcache.sequence import Chunk, StepPlan
from crossdock.kvtransfer.registry import Allocator
from crossdock.proto.errors import NotFinite
from crossdock.proto.memory import PoolMemory


def spoil(memory: PoolMemory, link: Connection) -> None:
    """In the process of the other rank."""
    for part in memory.views:
        part[4:8] = np.full_like(part[4:8].view(np.float32), np.nan).view(np.uint8)
    link.send(None)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = EngineConfig(
        engine=simulated("vllm", args={"tensor_parallel_size": 2}),
        model=os.environ["MODEL"],
        block_size=32,
        kv_blocks=BLOCKS,
    )
    allocator = Allocator("nixl")
    engine = registry.create(config, allocator)
    yield engine
    engine.close()
    allocator.close()


def test_each_rank_holds_half_of_a_block(engine: Engine) -> None:
    assert (engine.memory.ranks, len(engine.hosts), engine.layout.tp_degree) == (2, 1, 2)
    assert engine.memory.block_bytes == 2 * engine.memory.part.block_bytes


def test_what_a_former_owner_left_is_not_read_by_any_rank(engine: Engine) -> None:
    right = continued(engine, sequence(prompt_for(engine), 0, 1, 2, 3), 4)
    wrong = sequence(prompt_for(engine), 4, 5, 6, 7)
    with engine.hosts[0](spoil) as link:
        assert link.poll(10)
    with pytest.raises(NotFinite):
        engine.run(StepPlan((Chunk(wrong, 40, wrong.num_tokens - 40, True),)))
    engine.recover()
    assert continued(engine, sequence(prompt_for(engine), 4, 5, 6, 7), 4) == right
