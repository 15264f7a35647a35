"""What a worker tells of its speed, and when it takes a step for too long. Virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from roles_kit import Site, job

from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan, StepWork
from crossdock.proto.types import Role, SamplingParams
from crossdock.worker import loop as engine_loop
from crossdock.worker.rates import Line, StepFit, StepTimes

PREFILL, DECODE = (4e-3, 2.2e-5, 7e-10), (4e-3, 5e-5, 2.7e-8)  # of an 8B model on one GPU


def steps_of_prompts(rng: random.Random) -> tuple[int, int]:
    """Chunks of 2,048 tokens and ends of prompts, behind up to 60,000 tokens."""
    tokens = rng.choice([2048, 2048, rng.randint(20, 2048)])
    return tokens, tokens * (rng.choice([0, 0, 5000, 20_000, 60_000]) + tokens)


def steps_of_decodes(rng: random.Random) -> tuple[int, int]:
    sequences = rng.randint(20, 50)
    return sequences, sequences * rng.randint(8000, 20_000)


def noise(rng: random.Random) -> float:
    return rng.uniform(0.95, 1.05)


@pytest.mark.parametrize(
    ("truth", "by_size", "step"),
    [(PREFILL, True, steps_of_prompts), (DECODE, False, steps_of_decodes)],
)
def test_a_fit_finds_what_steps_cost(
    truth: tuple[float, float, float], by_size: bool, step: Callable[..., tuple[int, int]]
) -> None:
    fit, true, rng = StepFit(by_size=by_size), Line(*truth), random.Random(1)
    for i in range(600):
        size, context = step(rng)
        pause_s = 1.0 if i % 97 == 50 else 0.0  # a garbage collection, say
        fit.observe(size, context, true.seconds(size, context) * noise(rng) + pause_s)
    assert fit.line.context == pytest.approx(true.context, rel=0.05)
    for _ in range(50):
        size, context = step(rng)
        assert fit.line.seconds(size, context) == pytest.approx(
            true.seconds(size, context), rel=0.05, abs=1e-3
        )


def test_a_fit_that_began_with_a_pause_is_soon_right() -> None:
    fit, true, rng = StepFit(), Line(*DECODE), random.Random(1)
    fit.observe(64, 10**6, 5.0)
    for _ in range(100):
        size, context = steps_of_decodes(rng)
        fit.observe(size, context, true.seconds(size, context))
    assert fit.line.seconds(30, 300_000) == pytest.approx(true.seconds(30, 300_000), rel=0.1)


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    fit, true, rng = StepFit(decay=0.99), Line(*DECODE), random.Random(1)
    for i in range(900):
        size, context = steps_of_decodes(rng)
        fit.observe(size, context, true.seconds(size, context) * (1 if i < 300 else 5))
    assert fit.line.seconds(30, 300_000) == pytest.approx(5 * true.seconds(30, 300_000), rel=0.05)


def test_chunks_beside_decodes_leave_both_fits_as_they_are() -> None:
    """They share a read of the weights, say: 3 ms less than both alone."""
    times, rng = StepTimes(), random.Random(1)
    prefill, decode = Line(*PREFILL), Line(*DECODE)
    for i in range(1500):
        prompts, decodes = steps_of_prompts(rng), steps_of_decodes(rng)
        seconds = prefill.seconds(*prompts) + decode.seconds(*decodes)
        if i % 3 == 0:
            times.observe(StepWork(*prompts, 0, 0), prefill.seconds(*prompts) * noise(rng))
        elif i % 3 == 1:
            times.observe(StepWork(0, 0, *decodes), decode.seconds(*decodes) * noise(rng))
        else:
            times.observe(StepWork(*prompts, *decodes), (seconds - 0.003) * noise(rng))
    prompts, decodes = (2048, 2048 * 12_000), (35, 35 * 14_000)
    alone_s, beside_s = prefill.seconds(*prompts), decode.seconds(*decodes)
    assert times.seconds(StepWork(*prompts, 0, 0)) == pytest.approx(alone_s, rel=0.05)
    assert times.seconds(StepWork(0, 0, *decodes)) == pytest.approx(beside_s, rel=0.05)
    mixed_s = alone_s + beside_s - 0.003
    assert times.seconds(StepWork(*prompts, *decodes)) == pytest.approx(mixed_s, rel=0.05)
    assert times.prompts is times.beside, "what a prompt costs those who decode here"


def test_a_worker_that_once_computed_beside_decodes_goes_by_what_it_does_now() -> None:
    """A prefill worker that had decoded once never measured anew: it counted as not measured, with
    a prediction that no prompt corrected."""
    times = StepTimes()
    for tokens in range(100, 140):
        times.observe(StepWork(0, 0, 1, 100), 0.02)
        times.observe(StepWork(tokens, tokens**2, 1, 100), 0.02 + 2e-3 * tokens)
    assert times.prompts is times.beside
    for i in range(400):
        times.observe(StepWork(100 + i % 40, 10_000, 0, 0), 1e-3 * (100 + i % 40))
    assert times.prompts.line.seconds(120, 10_000) == pytest.approx(0.12, rel=0.05)


def test_a_worker_that_never_decodes_alone_tells_both() -> None:
    times, rng = StepTimes(), random.Random(1)
    prefill, decode = Line(*PREFILL), Line(*DECODE)
    times.observe(StepWork(2048, 2048**2, 0, 0), prefill.seconds(2048, 2048**2))
    for _ in range(400):
        prompts, decodes = steps_of_prompts(rng), steps_of_decodes(rng)
        both_s = prefill.seconds(*prompts) + decode.seconds(*decodes)
        times.observe(StepWork(*prompts, *decodes), both_s)
    work = StepWork(2048, 2048 * 12_000, 35, 35 * 14_000)
    both_s = prefill.seconds(*work[:2]) + decode.seconds(*work[2:])
    assert times.seconds(work) == pytest.approx(both_s, rel=0.1)


def test_short_prompts_do_not_make_the_rate_look_bad() -> None:
    """A step of 30 ms and 27,000 tokens a second: 50 tokens alone go at 1,600 a second."""
    fit, rng = StepFit(by_size=True), random.Random(1)
    for _ in range(300):
        tokens = rng.randint(5, 100)
        fit.observe(tokens, tokens**2, (0.03 + tokens / 27_000) * noise(rng))
    assert fit.line.base == pytest.approx(0.03, rel=0.1)
    assert 1 / fit.line.slope > 9000
    assert 70 <= fit.largest <= 100


@pytest.mark.parametrize(
    ("by_size", "expected"), [(True, (0.0, 0.001, 0.0)), (False, (0.1, 0.0, 0.0))]
)
def test_steps_that_are_all_alike(by_size: bool, expected: tuple[float, float, float]) -> None:
    fit = StepFit(by_size=by_size)
    assert fit.line == (0.0, 0.0, 0.0)
    for _ in range(20):
        fit.observe(100, 10_000, 0.1)
    assert fit.line == pytest.approx(expected, abs=1e-9)


def test_a_prompt_token_is_never_free() -> None:
    fit = StepFit(by_size=True)
    for tokens in (10, 20, 30):
        fit.observe(tokens, tokens**2, 1 / tokens)  # the more the quicker: noise
    assert min(fit.line) >= 0 and fit.line.slope > 0


def test_no_part_of_a_steps_time_is_below_0() -> None:
    rng = random.Random(1)
    for by_size in (True, False):
        for _ in range(300):
            fit = StepFit(by_size=by_size)
            for _ in range(rng.randint(1, 9)):
                fit.observe(
                    rng.randint(1, 50), rng.choice([0, rng.randint(1, 10**6)]), rng.random()
                )
                assert min(fit.line) >= 0 and max(fit.line) > 0


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


def test_base_and_slope_are_told_apart_by_steps_that_differ() -> None:
    fit = StepFit(by_size=True)
    assert not fit.told_apart
    for _ in range(50):
        fit.observe(200, 20_000, 0.02)
    assert not fit.told_apart, "they are all alike"
    for size in (200, 400, 600):
        fit.observe(size, 20_000, 0.02)
    assert fit.told_apart
    for _ in range(1000):
        fit.observe(200, 20_000, 0.02)
    assert not fit.told_apart, "and forgotten"
