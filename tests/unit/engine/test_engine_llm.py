"""Offline completion: continuous batching over the pool says what each prompt alone would."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline import LLM
from tiny import make_tiny_model

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import FinishReason, SamplingParams

# All 128 bits of their XXH3 are equal, under every parent: benchmarks/hash_collisions.py.
COLLIDING = [
    [*[0] * 8, 38633, 48125, 10518, 1026, 2116, 41382, 47035, 7769],
    [*[0] * 8, 45806, 27835, 3345, 21316, 24372, 6356, 24779, 42795],
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), num_blocks=40, device="cpu", chunk_tokens=24)


def test_batched_equals_alone(llm: LLM) -> None:
    """More sequences than the pool holds at once, prompts longer than a step's budget."""
    prompts = [[(7 * i + j * j) % 384 for j in range(10 + 13 * i)] for i in range(9)]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert all(len(g.token_ids) == 12 for g in together)
    assert {g.finish_reason for g in together} == {FinishReason.LENGTH}
    llm.pool.check_integrity()


def test_seeded_sampling_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0.9, seed=s, max_tokens=8, ignore_eos=True) for s in (1, 2)
    ]
    together = llm.generate([[5, 6, 7]] * 2, params)
    assert together[0].token_ids != together[1].token_ids
    assert llm.generate([[5, 6, 7]], params[1])[0].token_ids == together[1].token_ids


def test_prefix_cache_changes_nothing_but_the_work(llm: LLM) -> None:
    prompt = [(3 * j + 1) % 384 for j in range(50)]
    first, second = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert first.token_ids == second.token_ids


def test_no_prompt_is_served_the_kv_of_another(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model", vocab_size=49_152))
    first, second = ([*block, 5, 6, 7] for block in COLLIDING)
    [alone] = LLM(model, num_blocks=40, device="cpu").generate([second], GREEDY)
    llm = LLM(model, num_blocks=40, device="cpu")
    [before] = llm.generate([first], GREEDY)
    [after] = llm.generate([second], GREEDY)
    assert before.token_ids != alone.token_ids
    assert (after.cached_tokens, after.token_ids) == (0, alone.token_ids)


def test_blocks_of_generated_tokens_are_found_by_the_next_turn(llm: LLM) -> None:
    prompt = [(11 * j + 2) % 384 for j in range(10)]
    [first] = llm.generate([prompt], GREEDY)
    [second] = llm.generate([[*prompt, *first.token_ids]], GREEDY)
    assert second.cached_tokens == 16


def test_text_in_text_out(llm: LLM) -> None:
    [plain] = llm.generate(["The capital of France"], GREEDY)
    assert plain.text == llm.text.decode(plain.token_ids)
    [chat] = llm.generate(["The capital of France"], GREEDY, chat=True)
    assert chat.token_ids != plain.token_ids


def test_ends(llm: LLM) -> None:
    [free] = llm.generate([[1, 2, 3]], GREEDY)
    stop = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(free.token_ids[4],))
    first = free.token_ids.index(free.token_ids[4])
    [stopped] = llm.generate([[1, 2, 3]], stop)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == FinishReason.STOP
    long = [1] * (40 * 16 - 3)
    [full] = llm.generate([long], GREEDY)
    assert (len(full.token_ids), full.finish_reason) == (3, FinishReason.LENGTH)
    llm.pool.check_integrity()


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, ignore_eos=True)
    [result] = llm.generate([[1, 2, 3]], params)
    for token_id, token in zip(result.token_ids, result.logprobs, strict=True):
        assert token.token_id == token_id == token.top_logprobs[0][0]
        assert token.logprob is not None and token.logprob <= 0
        assert len(token.top_logprobs) == 2


@pytest.mark.parametrize("prompt", [[], [384], [-1], [1] * 640])
def test_refuses_before_any_work(llm: LLM, prompt: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]"):
        llm.generate([[1, 2], prompt], GREEDY)
    llm.pool.check_integrity()
