"""The forward pass against transformers: same weights, same tokens, logits within 1e-3."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model

from crossdock.engine.native.runner import ModelRunner
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.store import resolve
from crossdock.proto.types import SamplingParams

TOLERANCE = 1e-3
BLOCK_SIZE = 16
NUM_BLOCKS = 64
GREEDY = SamplingParams(temperature=0.0)

VARIANTS = {
    "llama": {},
    "mistral": {},
    "mistral-window": {"architecture": "mistral", "sliding_window": 40},
    "qwen2": {},
    "qwen2-window": {"architecture": "qwen2", "sliding_window": 24},
    "qwen3": {},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"architecture": request.param, **VARIANTS[request.param]}
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / request.param, **options)


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    return make_runner(folder)


def make_runner(folder: Path, **options: object) -> ModelRunner:
    return ModelRunner(
        resolve(str(folder)), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, device="cpu", **options
    )


class Tables:
    """Hands out blocks in a random order, so that no table is a run."""

    def __init__(self, seed: int = 0) -> None:
        self._free = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(self._free)

    def sequence(self, token_ids: list[int], room: int = 0) -> Sequence:
        count = -(-(len(token_ids) + room) // BLOCK_SIZE)
        table = [self._free.pop() for _ in range(count)]
        return Sequence(
            sequence_id=f"sequence-{table[0]}",
            token_ids=list(token_ids),
            prompt_tokens=len(token_ids),
            sampling=GREEDY,
            block_table=table,
        )


def tokens(count: int, vocab_size: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=count)


def reference_logits(reference: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([token_ids])).logits[0].float()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return (ours - theirs).abs().max().item()


def teacher_forced(runner: ModelRunner, sequence: Sequence, lengths: list[int]) -> torch.Tensor:
    """Logits of every token of the sequence, computed in chunks of `lengths`."""
    parts, start = [], 0
    for length in lengths:
        plan = StepPlan((Chunk(sequence, start, length, True),))
        parts.append(runner.logits(plan, every_token=True))
        start += length
    assert start == sequence.num_tokens
    return torch.cat(parts)


@pytest.mark.parametrize(
    "lengths",
    [[150], pytest.param([1] * 150, marks=pytest.mark.slow), [7, 1, 33, 2, 64, 3, 40]],
)
def test_logits_in_any_split(
    runner: ModelRunner, reference: torch.nn.Module, lengths: list[int]
) -> None:
    ids = tokens(150, runner.config.vocab_size)
    ours = teacher_forced(runner, Tables().sequence(ids), lengths)
    theirs = reference_logits(reference, ids)
    assert theirs.std() > 0.5  # else the tolerance would say nothing
    assert error(ours, theirs) <= TOLERANCE


def test_mixed_batch(runner: ModelRunner, reference: torch.nn.Module) -> None:
    """Decode tokens, a first chunk, a later chunk and one that is not sampled in one step."""
    tables, vocab = Tables(), runner.config.vocab_size
    lengths = (90, 21, 64, 100, 3)
    one, two, three, four, five = (tables.sequence(tokens(n, vocab, seed=n)) for n in lengths)
    before = (Chunk(one, 0, 89, False), Chunk(two, 0, 20, False), Chunk(four, 0, 35, False))
    assert runner.run(StepPlan(before)) == [[], [], []]
    plan = StepPlan(
        (
            Chunk(one, 89, 1, True),
            Chunk(three, 0, 50, False),
            Chunk(four, 35, 65, True),
            Chunk(two, 20, 1, True),
            Chunk(five, 0, 3, True),
        )
    )
    ours = runner.logits(plan)
    theirs = torch.stack(
        [reference_logits(reference, s.token_ids)[-1] for s in (one, four, two, five)]
    )
    assert error(ours, theirs) <= TOLERANCE
    rest = runner.logits(StepPlan((Chunk(three, 50, 14, True),)))
    assert error(rest[0], reference_logits(reference, three.token_ids)[-1]) <= TOLERANCE


def test_greedy_tokens(runner: ModelRunner, reference: torch.nn.Module) -> None:
    """Three sequences decoded together say what transformers says of each alone."""
    tables, vocab = Tables(), runner.config.vocab_size
    sequences = [tables.sequence(tokens(n, vocab, seed=n), room=20) for n in (5, 31, 48)]
    plan = StepPlan(tuple(Chunk(s, 0, s.num_tokens, True) for s in sequences))
    for _ in range(20):
        for sequence, (token,) in zip(sequences, runner.run(plan)):
            sequence.token_ids.append(token.token_id)
        plan = StepPlan(tuple(Chunk(s, s.num_tokens - 1, 1, True) for s in sequences))
    for sequence in sequences:
        theirs = reference_logits(reference, sequence.token_ids)
        best = theirs.topk(2).values
        for at in range(sequence.prompt_tokens, sequence.num_tokens):
            drawn = theirs[at - 1, sequence.token_ids[at]]
            assert best[at - 1, 0] - drawn <= TOLERANCE


def test_pool_in_an_outside_buffer(folder: Path, reference: torch.nn.Module) -> None:
    """The pool may lie in a transport's memory: KV is written there and nowhere else."""
    import numpy as np

    from crossdock.model.config import load_config

    config = load_config(resolve(str(folder)))
    nbytes = NUM_BLOCKS * ModelRunner.kv_bytes_per_block(config, BLOCK_SIZE, "float32", "cpu")
    buffer = np.zeros(nbytes + 64, dtype=np.uint8)
    generations = np.zeros(NUM_BLOCKS, dtype=np.int64)
    runner = make_runner(folder, buffer=buffer, generations=generations)
    sequence = Tables().sequence(tokens(20, config.vocab_size))
    ours = teacher_forced(runner, sequence, [20])
    assert error(ours, reference_logits(reference, sequence.token_ids)) <= TOLERANCE
    written = buffer[:nbytes].reshape(NUM_BLOCKS, -1).any(axis=1)
    assert set(written.nonzero()[0]) == set(sequence.block_table)
    assert runner.memory.regions[0].address == buffer.ctypes.data
    assert runner.memory.block_bytes * NUM_BLOCKS == nbytes
    assert runner.kv.generations is generations


def test_handed_over_blocks_continue(folder: Path, reference: torch.nn.Module) -> None:
    """KV blocks copied byte for byte into another runner's pool are all that decode needs."""
    prefill, decode = make_runner(folder), make_runner(folder)
    ids = tokens(70, prefill.config.vocab_size)
    source, target = Tables(1).sequence(ids), Tables(2).sequence(ids)
    prefill.run(StepPlan((Chunk(source, 0, 69, False),)))
    for here, there in zip(source.block_table, target.block_table):
        decode.kv.data[there] = prefill.kv.data[here]
    ours = decode.logits(StepPlan((Chunk(target, 69, 1, True),)))
    assert error(ours[0], reference_logits(reference, ids)[-1]) <= TOLERANCE


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_warmup_leaves_the_pool_alone(tiny_model: Path, block_size: int) -> None:
    """And afterwards nothing is left to compile."""
    from crossdock.engine.native.attention import numba_kernels as kernels

    runner = ModelRunner(
        resolve(str(tiny_model)), num_blocks=80, block_size=block_size, device="cpu"
    )
    runner.warmup()
    assert not runner.kv.data.any()
    used = (
        kernels.rms_norm,
        kernels.swiglu,
        kernels.rope_and_store(16),
        kernels.paged_attention(16, 2, block_size),
        kernels.gather_context(16, block_size),
        kernels.chunk_attention(16, 2),
    )
    compiled = [kernel.signatures for kernel in used]
    assert all(compiled)
    sequence = Sequence("s", tokens(60, 384), 60, GREEDY, block_table=list(range(60)))
    for start, length in ((0, 30), (30, 3), (33, 26), (59, 1)):
        runner.run(StepPlan((Chunk(sequence, start, length, start == 59),)))
    assert [kernel.signatures for kernel in used] == compiled
