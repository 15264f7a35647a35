"""What a worker tells of its speed, and when it takes a step for too long. Virtual time."""

from __future__ import annotations

import random

import pytest
from roles_kit import Site, job

from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.proto.types import Role, SamplingParams
from crossdock.worker import loop as engine_loop
from crossdock.worker.rates import StepFit


def test_short_prompts_do_not_make_the_rate_look_bad() -> None:
    """A step of 30 ms and 27,000 tokens a second: 50 tokens alone go at 1,600 a second."""
    fit, rng = StepFit(by_size=True), random.Random(1)
    for _ in range(300):
        tokens = rng.randint(5, 100)
        fit.observe(tokens, (0.03 + tokens / 27_000) * rng.uniform(0.95, 1.05))
    base, per_token = fit.base_and_slope
    assert base == pytest.approx(0.03, rel=0.1)
    assert 1 / per_token > 9000
    assert 70 <= fit.largest <= 100


@pytest.mark.parametrize(("by_size", "expected"), [(True, (0.0, 0.001)), (False, (0.1, 0.0))])
def test_steps_that_are_all_alike(by_size: bool, expected: tuple[float, float]) -> None:
    fit = StepFit(by_size=by_size)
    assert fit.base_and_slope == (0.0, 0.0)
    for _ in range(20):
        fit.observe(100, 0.1)
    assert fit.base_and_slope == pytest.approx(expected, abs=1e-9)


def test_a_prompt_token_is_never_free() -> None:
    fit = StepFit(by_size=True)
    for tokens in (10, 20, 30):
        fit.observe(tokens, 1 / tokens)  # the more the quicker: noise
    base, per_token = fit.base_and_slope
    assert base > 0 and per_token > 0


def plan(*lengths: int) -> StepPlan:
    chunks = [
        Chunk(Sequence("s", [0] * n, n, SamplingParams()), 0, n, sample=True) for n in lengths
    ]
    return StepPlan(tuple(chunks))


def test_a_load_has_what_steps_of_each_kind_take() -> None:
    role = Site().worker(Role.PREFILL).role
    assert role.expected_s(plan(32)) == 0.0
    for tokens in (8, 16, 24, 32):
        role.observe_step(plan(tokens, tokens), 0.02 + 2 * tokens / 1000)
        role.observe_step(plan(*[1] * tokens), 0.01 + tokens / 10_000)
    assert role.expected_s(plan(20, 20)) == pytest.approx(0.06, rel=0.05)
    assert role.expected_s(plan(*[1] * 20)) == pytest.approx(0.012, rel=0.05)
    load = role.load()
    assert load.prefill_base_s == pytest.approx(0.02, rel=0.15)
    assert load.prefill_tokens_per_s == pytest.approx(1000, rel=0.1)
    assert load.prefill_step_tokens == 64


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_step_is_late_by_its_own_length(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A long one that takes its time is healthy; a short one that takes as long hangs."""
    worker, now, late = Site().worker(Role.PREFILL), [1000.0], []
    monkeypatch.setattr(engine_loop.time, "monotonic", lambda: now[0])
    for length in (1, 8, 16, 32):
        for _ in range(20):
            worker.role.observe_step(plan(length), 0.02 * length)
    assert not worker.loop.late, "nothing is under way"

    def run(plan: StepPlan) -> list:
        now[0] += 1.0
        late.append(worker.loop.late)
        now[0] += 3.0
        late.append(worker.loop.late)
        return toy(plan)

    toy = worker.runner.run
    worker.runner.run = run  # type: ignore[method-assign]
    worker.role.submit(job(list(range(5, 5 + tokens))))
    worker.turn()
    assert late == ([True, True] if tokens == 1 else [False, True])
    assert not worker.loop.late, "it is over"
