"""Numbers out of a dtype's range: the request that made them ends, and nobody else sees them."""

from __future__ import annotations

import json

import pytest
import torch
from offline import LLM
from ops_kit import config, plan
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from crossdock.engine.native.attention import ops
from crossdock.engine.native.attention.numba_ops import NumbaStep
from crossdock.engine.native.attention.torch_ops import TorchStep
from crossdock.engine.native.batch import make_batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.engine.native.rope import rope_table
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.proto.errors import NotFinite
from crossdock.proto.types import SamplingParams

OVERFLOWING = 300  # a token whose embedding is infinite, as a large one is in float16
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
PROMPTS = [list(range(20, 20 + length)) for length in (3, 21, 37)]
KINDS = [("float32", "numba"), ("float32", "torch"), ("float16", "torch"), ("bfloat16", "torch")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_tiny_model(tmp_path_factory.mktemp("overflow") / "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][OVERFLOWING] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return str(folder)


@pytest.fixture(params=KINDS, ids="-".join)
def make(request: pytest.FixtureRequest, model: str, monkeypatch: pytest.MonkeyPatch):
    dtype, kind = request.param
    monkeypatch.setattr(ops, "_numba_fits", lambda *_: kind == "numba")
    return lambda: LLM(model, dtype=dtype, num_blocks=8)


def test_after_an_overflowing_prompt_others_answer_as_on_a_fresh_pool(make) -> None:
    wanted = [make().generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    used = make()
    with pytest.raises(NotFinite, match="not finite"):
        used.generate([[OVERFLOWING] * 120], GREEDY)
    assert used.pool.num_evictable == 0
    assert [used.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS] == wanted
    together = make()
    with pytest.raises(NotFinite):
        together.generate([[OVERFLOWING] * 120], GREEDY)
    assert [done.token_ids for done in together.generate(PROMPTS, GREEDY)] == wanted


def test_the_prompt_that_overflows_is_the_one_that_is_named(make) -> None:
    """Also where its last rows, the only ones that are sampled, come in a later step."""
    runner = make().runner

    def chunk(name: str, ids: list[int], block: int, length: int) -> Chunk:
        table = list(range(block, block + 3))
        return Chunk(Sequence(name, ids, len(ids), GREEDY, block_table=table), 0, length, False)

    good, bad = chunk("good", list(range(9)), 3, 9), chunk("bad", [5, OVERFLOWING, 7], 0, 2)
    with pytest.raises(NotFinite) as caught:
        runner.run(StepPlan((good, bad)))
    assert caught.value.sequence_ids == {"bad"}
    assert runner.run(StepPlan((good,))) == [[]]


def test_a_sequence_never_goes_on_from_blocks_that_are_not_finite(make) -> None:
    """The blocks found finite are cached, those after the overflow are not."""
    llm = make()
    prompt = [*range(40, 60), OVERFLOWING, *range(60, 80)]
    for _ in range(2):
        with pytest.raises(NotFinite):
            llm.generate([prompt], GREEDY)
    fresh = make().generate([prompt[:20]], GREEDY)[0].token_ids
    assert llm.generate([prompt[:20]], GREEDY)[0].token_ids == fresh


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("kind", [NumbaStep, TorchStep])
def test_what_lies_behind_a_sequence_is_not_read(
    kind: type, block_size: int, window: int | None
) -> None:
    """A pool full of NaN but for the sequences' own tokens: attention as over zeros."""
    heads = (2, 2) if block_size == 1 else (6, 2)  # as test_engine_ops has them: compiled once
    shape = config(sliding_window=window, num_heads=heads[0], num_kv_heads=heads[1])
    steps, used = plan(block_size)
    batch = make_batch(steps, block_size, used)
    generator = torch.Generator().manual_seed(0)
    width = (heads[0] + 2 * heads[1]) * shape.head_dim
    qkv = torch.randn(batch.num_rows, width, generator=generator)
    results = []
    for rest in (0.0, float("nan")):
        kv = KVCache(used, shape, block_size, torch.float32)
        kv.data.fill_(rest)
        for chunk in steps.chunks:
            for position in range(chunk.start):
                block = chunk.sequence.block_table[position // block_size]
                kv.data[block, :, :, :, position % block_size] = position % 7 - 3.0
        with torch.inference_mode():
            rope = rope_table(shape)
            step = kind(shape, rope.numpy() if kind is NumbaStep else rope, batch, kv)
            mine = qkv.clone()
            step.store(1, mine, None, None)
            results.append([step.attend(1, mine, False), step.attend(1, mine, True)])
    for clean, dirty in zip(*results):
        assert dirty.isfinite().all()
        assert torch.equal(clean, dirty)


def test_logits_that_are_not_finite_name_their_sequence(make) -> None:
    runner = make().runner
    head, chunks = runner._model._head, []
    for name in ("a", "b"):
        prompt = Sequence(name, [5, 6, 7], 3, GREEDY, block_table=[len(chunks)])
        chunks.append(Chunk(prompt, 0, 3, True))

    def overflow_in_the_second(x: torch.Tensor) -> torch.Tensor:
        logits = head(x).clone()
        logits[1, 9] = -float("inf")
        return logits

    runner._model._head = overflow_in_the_second
    with pytest.raises(NotFinite) as caught:
        runner.run(StepPlan(tuple(chunks)))
    assert caught.value.sequence_ids == {"b"}
