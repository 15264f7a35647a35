"""What the runner of vLLM is told from step to step: sequences that come, go, pause and move."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_contract import make, sequence

from crossdock.engine.contract import Engine
from crossdock.engine.vllm.rank import Computed
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.proto.errors import NotFinite
from crossdock.proto.types import SamplingParams

BLOCK = 32


@pytest.fixture(scope="module")
def engine(small_llama: Path) -> Engine:
    return make("vllm", small_llama, block_size=BLOCK)


def ids(salt: int, length: int) -> list[int]:
    return [(7 * i + salt) % 370 + 5 for i in range(length)]


def step(engine: Engine, *sequences: Sequence) -> None:
    """The next token of each, its prompt whole at first."""
    chunks = [Chunk.of(s, s.num_computed, s.num_tokens - s.num_computed) for s in sequences]
    for one, tokens in zip(sequences, engine.run(StepPlan(tuple(chunks))), strict=True):
        one.num_computed = one.num_tokens
        one.token_ids += [token.token_id for token in tokens]


def alone(engine: Engine, prompt: list[int], tokens: int, *blocks: int) -> list[int]:
    one = sequence(prompt, *blocks)
    for _ in range(tokens):
        step(engine, one)
    return one.token_ids


def test_who_pauses_and_who_ends_leaves_the_others_alone(engine: Engine) -> None:
    first, second, third = (sequence(ids(i, 40), 2 * i, 2 * i + 1) for i in range(3))
    for running in ([first], [second, first], [third, first], [first, second, third], [third]):
        step(engine, *running)
    for number, one in enumerate((first, second, third)):
        assert one.token_ids == alone(engine, ids(number, 40), one.num_generated, 10, 11)
    assert len(engine._runner.requests) == 1  # type: ignore[attr-defined]


def test_a_sequence_goes_on_in_blocks_that_were_added_and_in_others(engine: Engine) -> None:
    one = sequence(ids(3, 62), 0, 1)
    for table in ([0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [7, 1, 2], [7, 1, 2]):
        if table[0] == 7:
            for part in engine.memory.views:
                part[7] = part[0]
        one.block_table = table
        step(engine, one)
    assert one.token_ids == alone(engine, ids(3, 62), 6, 9, 10, 11)


def test_a_sampled_sequence_goes_on_as_if_nothing_had_happened(engine: Engine) -> None:
    """With what is drawn by seed and position, penalties that count what came before, logprobs."""
    sampling = SamplingParams(
        temperature=1.0, seed=7, top_p=0.9, frequency_penalty=0.5, logprobs=2, max_tokens=32
    )
    whole = sequence(ids(4, 40), 0, 1)
    whole.sampling = sampling
    for _ in range(12):
        step(engine, whole)
    again = Sequence("t", whole.token_ids[:46], 40, sampling, block_table=[4, 5])
    while again.num_tokens < whole.num_tokens:
        step(engine, again)
    assert again.token_ids == whole.token_ids
    assert len(set(whole.token_ids[40:])) > 6


def test_a_step_that_raised_is_run_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = sequence(ids(5, 40), 0, 1), sequence(ids(6, 40), 2, 3)
    step(engine, one)
    runner: Any = engine._runner  # type: ignore[attr-defined]
    for broken in ("_model_forward", "_prepare_inputs"):
        with monkeypatch.context() as patch:
            patch.setattr(runner, broken, lambda *args, **named: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                step(engine, one, other)
        engine.recover()
        step(engine, one)
    step(engine, one, other)
    assert one.token_ids == alone(engine, ids(5, 40), 4, 8, 9)
    assert other.token_ids == alone(engine, ids(6, 40), 1, 8, 9)


def test_kv_that_is_not_finite_ends_its_sequence_alone(engine: Engine) -> None:
    one, other = sequence(ids(7, 40), 0, 1), sequence(ids(8, 40), 2, 3)
    step(engine, one, other)
    for part in engine.memory.views:
        part[0].view(np.float32)[:] = np.nan
    with pytest.raises(NotFinite) as caught:
        step(engine, one, other)
    assert caught.value.sequence_ids == {"s"}
    step(engine, other)


@pytest.mark.parametrize("value, finite", [(-3.0, True), (math.nan, False), (math.inf, False)])
def test_half_precision_is_finite_where_its_sum_would_not_be(
    engine: Engine, value: float, finite: bool
) -> None:
    """-3 × 50,000 is beyond what float16 holds: ordinary logits of a large vocabulary."""
    one = sequence(ids(1, 1), 0)
    plan, logits = StepPlan((Chunk(one, 0, 1, True),)), torch.full((1, 50_000), -3.0).half()
    logits[0, 7] = value
    hidden = torch.full((1, 4096), 100.0).half()
    check = partial(engine._check_finite, plan, rows=np.array([0]))  # type: ignore[attr-defined]
    computed = Computed(logits, hidden, np.array([0, 1]))
    if finite:
        check(computed=computed)
        return
    with pytest.raises(NotFinite):
        check(computed=computed)


def test_what_a_former_owner_left_is_not_read(engine: Engine) -> None:
    """A sequence whose KV is not finite leaves blocks that the next one has not filled yet."""
    right = alone(engine, ids(9, 40), 4, 8, 9)
    one = sequence(ids(7, 40), 4, 5)
    step(engine, one)
    for part in engine.memory.views:
        part[4:6] = np.full_like(part[4:6].view(np.float32), np.nan).view(np.uint8)
    for _ in range(2):  # run again by itself, it finds what it had
        with pytest.raises(NotFinite):
            step(engine, one)
    assert alone(engine, ids(9, 40), 4, 4, 5) == right


def test_one_rank_waits_for_no_others(engine: Engine) -> None:
    """Each group of ranks has a thread that wakes 100 times a second; vLLM alone makes 13."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert names.count("gloo_tcp_loop\n") == 2


@pytest.mark.parametrize(
    "table, start, length, why",
    [
        ([0], 0, 40, "1 blocks of 32 tokens do not hold 40 tokens"),
        ([0, 12], 0, 40, "block ids must be from 0 to 11"),
        ([0, 1], 30, 20, "tokens 30 to 50 of 40"),
    ],
)
def test_what_kernels_would_not_look_at_is_refused(
    engine: Engine, table: list[int], start: int, length: int, why: str
) -> None:
    one = sequence(ids(1, 40), *table)
    with pytest.raises(ValueError, match=why):
        engine.run(StepPlan((Chunk(one, start, length, True),)))
