"""Log-probabilities of prompts against transformers' logits, in any split, beside others."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from crossdock.engine.native import scorer
from crossdock.engine.native.runner import ModelRunner
from crossdock.kvcache.sequence import Chunk, PromptScores, Sequence, StepPlan
from crossdock.model.store import resolve
from crossdock.proto.errors import NotFinite
from crossdock.proto.types import SamplingParams

TOP = 4
LENGTH = 90
SPLITS = [[90], [1] * 3 + [87], [7, 1, 33, 49], [64, 26]]


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> ModelRunner:
    return ModelRunner(resolve(str(tiny_model)), num_blocks=32, block_size=16, device="cpu")


@pytest.fixture(scope="module")
def ids(runner: ModelRunner) -> list[int]:
    return random.Random(3).choices(range(runner.config.vocab_size), k=LENGTH)


@pytest.fixture(scope="module")
def theirs(tiny_model: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocab] of what follows each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def asking(ids: list[int], first_block: int = 0, **sampling: object) -> Sequence:
    params = SamplingParams(**({"temperature": 0.0, "prompt_logprobs": TOP} | sampling))  # type: ignore[arg-type]
    table = list(range(first_block, first_block + -(-(len(ids) + 1) // 16)))
    return Sequence(f"s{first_block}", list(ids), len(ids), params, block_table=table)


def run(
    runner: ModelRunner, one: Sequence, lengths: list[int], *others: Chunk
) -> list[PromptScores]:
    found, start = [], 0
    for length in lengths:
        chunk = Chunk.of(one, start, length)
        runner.run(StepPlan((*others, chunk)))
        found += [chunk.scores] if chunk.scores is not None else []
        start += length
    return found


def check(found: list[PromptScores], ids: list[int], theirs: torch.Tensor, first: int = 1) -> None:
    assert [scores.first for scores in found] == [first, *(s.first + s.count for s in found[:-1])]
    logprobs = np.concatenate([scores.logprobs for scores in found])
    wanted = theirs[first - 1 : -1]
    given = torch.tensor(ids[first:])
    assert len(logprobs) == len(given)
    right = wanted.gather(1, given[:, None])
    assert np.allclose(logprobs, right[:, 0], atol=1e-4)
    ranks = np.concatenate([scores.ranks for scores in found])
    above, at_least = wanted > right + 1e-4, wanted >= right - 1e-4
    assert (above.sum(1).numpy() < ranks).all() and (ranks <= at_least.sum(1).numpy()).all()
    values = np.concatenate([scores.top_logprobs for scores in found])
    assert np.allclose(values, wanted.topk(TOP).values, atol=1e-4)
    named = torch.from_numpy(np.concatenate([scores.top_ids for scores in found])).long()
    assert np.allclose(values, wanted.gather(1, named), atol=1e-4)


@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_scores_are_those_of_a_direct_forward_in_any_split(
    runner: ModelRunner, ids: list[int], theirs: torch.Tensor, lengths: list[int]
) -> None:
    check(run(runner, asking(ids), lengths), ids, theirs)


def test_scores_beside_others_and_with_few_rows_at_once(
    runner: ModelRunner, ids: list[int], theirs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that asks for nothing and one that asks for more lie in the same steps; no more
    logits are made at once than was set, and none of what does not ask."""
    rows: list[int] = []
    whole = runner._model.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return whole(hidden)

    monkeypatch.setattr(runner._model, "logits", counted)
    monkeypatch.setattr(scorer, "SLICE_BYTES", 8 * 4 * runner.config.vocab_size)
    plain = Chunk.of(asking(ids[:40], 8, prompt_logprobs=None), 0, 30)
    more = Chunk.of(asking(ids[5:40], 16, prompt_logprobs=TOP + 2), 0, 20)
    found = run(runner, asking(ids), [50, 40], plain, more)
    check(found, ids, theirs)
    assert max(rows) == 8 and sum(rows) == 50 + 39 + 1 + 2 * 20  # and one that is sampled
    assert plain.scores is None and more.scores is not None
    assert more.scores.top_ids.shape == (20, TOP + 2)


def test_what_was_scored_before_is_not_scored_again(
    runner: ModelRunner, ids: list[int], theirs: torch.Tensor
) -> None:
    one = asking(ids)
    one.num_scored = 35
    assert one.reusable == 34
    check(run(runner, one, [20, 40, 30]), ids, theirs, first=35)
    one.num_scored = len(ids)
    assert one.reusable == len(ids) - 1 and run(runner, one, [90]) == []


def test_nothing_is_drawn_after_a_prompt_that_asks_for_no_token(
    runner: ModelRunner, ids: list[int], theirs: torch.Tensor
) -> None:
    one = asking(ids, max_tokens=0)
    chunk = Chunk.of(one, 0, LENGTH)
    assert runner.run(StepPlan((chunk,))) == [[]] and chunk.scores is not None
    check([chunk.scores], ids, theirs)


def test_the_best_token_is_told_exactly_as_in_its_alternatives(runner: ModelRunner) -> None:
    """Clients find out by equality whether a text is what greedy decoding gives."""
    greedy = asking([5, 6, 7, 8], prompt_logprobs=None)
    greedy.block_table = [0, 1, 2]
    for _ in range(30):
        chunk = Chunk(greedy, 0, greedy.num_tokens, True)
        ((token,),) = runner.run(StepPlan((chunk,)))
        greedy.token_ids.append(token.token_id)
    (scores,) = run(runner, asking(greedy.token_ids, prompt_logprobs=1), [greedy.num_tokens])
    assert (scores.top_ids[3:, 0] == greedy.token_ids[4:]).all()
    assert (scores.top_logprobs[3:, 0] == scores.logprobs[3:]).all() and (
        scores.ranks[3:] == 1
    ).all()


def test_scores_that_are_not_finite_name_their_sequence(
    runner: ModelRunner, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runner._model.logits
    monkeypatch.setattr(runner._model, "logits", lambda hidden: whole(hidden) * float("inf"))
    chunk = Chunk.of(asking(ids), 0, 50)
    with pytest.raises(NotFinite) as caught:
        runner.run(StepPlan((chunk,)))
    assert list(caught.value.sequence_ids) == ["s0"]
