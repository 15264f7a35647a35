"""The two implementations of the small operators agree, at sizes that are nobody's multiple."""

from __future__ import annotations

import pytest
import torch
from ops_kit import CPU, config, plan, sequence

from crossdock.engine.native.attention.numba_ops import NumbaStep
from crossdock.engine.native.attention.ops import StepOps, make_ops
from crossdock.engine.native.attention.torch_ops import TorchStep
from crossdock.engine.native.batch import Batch, make_batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.engine.native.rope import rope_table
from crossdock.kvcache.sequence import Chunk, StepPlan
from crossdock.model.config import ModelConfig


def both(shape: ModelConfig, batch: Batch, one: KVCache, other: KVCache) -> tuple[StepOps, StepOps]:
    rope = rope_table(shape)
    return NumbaStep(shape, rope.numpy(), batch, one), TorchStep(shape, rope, batch, other)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("block_size", "heads"), [(16, (6, 2)), (16, (4, 1)), (1, (2, 2)), (128, (6, 2))]
)
def test_attention_agrees(block_size: int, heads: tuple[int, int], window: int | None) -> None:
    shape = config(num_heads=heads[0], num_kv_heads=heads[1], sliding_window=window)
    steps, used = plan(block_size)
    batch = make_batch(steps, block_size, used)
    generator = torch.Generator().manual_seed(0)
    width = (heads[0] + 2 * heads[1]) * shape.head_dim
    qkv = torch.randn(batch.num_rows, width, generator=generator) * 2
    norms = 1 + torch.rand(2, shape.head_dim, generator=generator)
    kvs = [KVCache(used, shape, block_size, torch.float32) for _ in range(2)]
    kvs[0].data.normal_(generator=generator)
    kvs[1].data.copy_(kvs[0].data)
    results = []
    with torch.inference_mode():
        for step in both(shape, batch, *kvs):
            mine = qkv.clone()
            step.store(1, mine, norms[0], norms[1])
            results.append((step.attend(1, mine, False), step.attend(1, mine, True)))
    assert torch.allclose(kvs[0].data, kvs[1].data, atol=1e-5)
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-5)
    rows = torch.from_numpy(batch.sampled)
    assert torch.allclose(results[0][0][rows], results[0][1], atol=1e-5)


def test_large_scores() -> None:
    """Scores of hundreds, of either sign: the softmax neither overflows nor loses its winner."""
    shape = config()
    steps, used = plan(16)
    batch = make_batch(steps, 16, used)
    qkv = torch.randn(batch.num_rows, 10 * 32, generator=torch.Generator().manual_seed(1)) * 12
    results = []
    with torch.inference_mode():
        kvs = [KVCache(used, shape, 16, torch.float32) for _ in range(2)]
        for step in both(shape, batch, *kvs):
            mine = qkv.clone()
            step.store(0, mine, None, None)
            results.append(step.attend(0, mine, False))
    assert results[0].isfinite().all()
    assert torch.allclose(results[0], results[1], atol=5e-3)


def test_norm_and_swiglu_agree() -> None:
    shape = config()
    batch = make_batch(StepPlan((Chunk(sequence(5, [0]), 0, 5, True),)), 16, 1)
    kv = KVCache(1, shape, 16, torch.float32)
    hidden, weight = torch.randn(5, 50) * 3, torch.rand(50)
    gate_up = torch.randn(5, 74) * 40
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, 0.0, -90.0])
    with torch.inference_mode():
        numba, plain = both(shape, batch, kv, kv)
        assert torch.allclose(numba.norm(hidden, weight), plain.norm(hidden, weight), atol=1e-6)
        ours, theirs = numba.swiglu(gate_up), plain.swiglu(gate_up)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_what_numba_cannot_do_goes_to_torch() -> None:
    def made(shape: ModelConfig, dtype: torch.dtype) -> type:
        batch = make_batch(StepPlan((Chunk(sequence(5, [0]), 0, 5, True),)), 16, 1)
        return type(make_ops(shape, dtype, CPU)(batch, KVCache(1, shape, 16, dtype)))

    assert made(config(), torch.float32) is NumbaStep
    assert made(config(head_dim=24), torch.float32) is TorchStep
    assert made(config(), torch.bfloat16) is TorchStep


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (Chunk(sequence(20, [0]), 0, 20, True), "do not hold"),
        (Chunk(sequence(20, [0, 1]), 0, 21, True), "tokens 0 to 21 of 20"),
        (Chunk(sequence(20, [0, 1]), 3, 0, True), "tokens 3 to 3"),
        (Chunk(sequence(20, [0, 4]), 0, 20, True), "block ids"),
        (Chunk(sequence(20, [-1, 0]), 0, 20, True), "block ids"),
    ],
)
def test_batches_that_would_write_elsewhere(chunk: Chunk, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_batch(StepPlan((chunk,)), 16, 4)
