"""Steps of the engine that fail: who ends, who goes on with the tokens of an undisturbed run."""

from __future__ import annotations

import weakref

import pytest
from handoff_kit import PROMPT, all_free, tokens_of
from roles_kit import Site, job, undisturbed

from crossdock.kvcache.sequence import SampledToken, StepPlan
from crossdock.proto.errors import CrossdockError, NotFinite
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.worker import loop


def test_a_failed_step_hands_its_own_sequences_back_only(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = site.worker(Role.COLOCATED)
    d.role.submit(job(PROMPT))
    broken = d.runner.run
    monkeypatch.setattr(d.runner, "run", lambda plan: 1 / 0)
    d.turn()
    (output,) = d.take()
    assert output.error.code == worker_pb2.ERROR_CODE_DEVICE
    monkeypatch.setattr(d.runner, "run", broken)
    d.role.submit(job(PROMPT))
    d.turn(12)
    assert tokens_of(d.take()) == undisturbed(PROMPT, 8)
    all_free(d)


def test_one_bad_request_does_not_take_the_batch_with_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = site.worker(Role.COLOCATED)
    good, bad = job(PROMPT), job([5] * 20)
    run = d.runner.run

    def run_unless_bad(plan: StepPlan) -> list[SampledToken]:
        if any(chunk.sequence is bad.sequence for chunk in plan.chunks):
            raise CrossdockError("its logits are not finite")
        return run(plan)

    monkeypatch.setattr(d.runner, "run", run_unless_bad)
    for one in (good, bad):
        d.role.submit(one)
    d.turn(12)
    outputs = d.take()
    assert tokens_of([o for o in outputs if o.sequence_id == good.id]) == undisturbed(PROMPT, 8)
    (failed,) = [o for o in outputs if o.sequence_id == bad.id]
    assert failed.error.code == worker_pb2.ERROR_CODE_INTERNAL
    all_free(d)


def test_a_sequence_fails_for_itself_where_the_device_serves_others(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was raised; the count of broken steps, which ends a worker, stays at none."""
    d = site.worker(Role.COLOCATED)
    monkeypatch.setattr(loop, "_exit_soon", lambda why: pytest.fail("the worker ended"))
    run = d.runner.run

    def run_short_ones(plan: StepPlan) -> list[SampledToken]:
        if any(c.sequence.prompt_tokens > len(PROMPT) for c in plan.chunks):
            raise MemoryError("a prompt as long as this")
        return run(plan)

    monkeypatch.setattr(d.runner, "run", run_short_ones)
    for _ in range(5):
        good, large = job(PROMPT, max_tokens=2), job([5] * (len(PROMPT) + 9))
        for one in (good, large):
            d.role.submit(one)
        d.turn(6)
        outputs = d.take()
        assert tokens_of([o for o in outputs if o.sequence_id == good.id]) == undisturbed(PROMPT, 2)
        (failed,) = [o for o in outputs if o.sequence_id == large.id]
        assert failed.error.code == worker_pb2.ERROR_CODE_INTERNAL
    for _ in range(5):
        d.role.submit(job([5] * (len(PROMPT) + 9)))
        d.turn()
        (failed,) = d.take()
        assert failed.error.code == worker_pb2.ERROR_CODE_DEVICE, "nothing shows whose fault it is"
    all_free(d)


def test_a_step_is_tried_again_without_the_memory_of_the_one_that_failed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = site.worker(Role.COLOCATED)
    run, held = d.runner.run, list[weakref.ref]()

    class Tensor:
        """What a step makes; there is room for one step's."""

    def run_in_little_memory(plan: StepPlan) -> list[SampledToken]:
        made = Tensor()
        if len(plan.chunks) > 1 or any(one() is not None for one in held):
            held.append(weakref.ref(made))
            raise MemoryError
        return run(plan)

    monkeypatch.setattr(d.runner, "run", run_in_little_memory)
    jobs = [job(PROMPT), job(PROMPT[::-1])]
    for one in jobs:
        d.role.submit(one)
    d.turn(12)
    outputs = d.take()
    for one, prompt in zip(jobs, (PROMPT, PROMPT[::-1])):
        mine = [o for o in outputs if o.sequence_id == one.id]
        assert tokens_of(mine) == undisturbed(prompt, 8)
    assert held
    all_free(d)


def test_a_worker_whose_device_is_broken_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    d = site.worker(Role.COLOCATED)
    ended: list[str] = []
    monkeypatch.setattr(loop, "_exit_soon", ended.append)
    for name in ("run", "recover"):
        monkeypatch.setattr(d.runner, name, lambda *_: 1 / 0)
    d.role.submit(job(PROMPT))
    d.turn()
    assert not ended, "two steps"
    d.role.submit(job(PROMPT))
    d.turn()
    assert ended == ["4 engine steps failed in a row"]
    assert {o.error.code for o in d.take()} == {worker_pb2.ERROR_CODE_DEVICE}


def test_sequences_that_a_step_blames_end_and_the_others_run_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = site.worker(Role.COLOCATED)
    prompts = (PROMPT[:9], PROMPT[20:29])
    good, bad = [job(prompt) for prompt in prompts], job([5] * 4)
    run = d.runner.run

    def run_unless_bad(plan: StepPlan) -> list[SampledToken]:
        if any(chunk.sequence is bad.sequence for chunk in plan.chunks):
            raise NotFinite("not finite", [bad.id])
        return run(plan)

    monkeypatch.setattr(d.runner, "run", run_unless_bad)
    for one in (good[0], bad, good[1]):
        d.role.submit(one)
    d.turn()
    assert [len(plan.chunks) for plan in d.runner.plans] == [2], "in one step"
    d.turn(11)
    outputs = d.take()
    for one, prompt in zip(good, prompts):
        mine = [o for o in outputs if o.sequence_id == one.id]
        assert tokens_of(mine) == undisturbed(prompt, 8)
    (failed,) = [o for o in outputs if o.sequence_id == bad.id]
    assert failed.error.code == worker_pb2.ERROR_CODE_NOT_FINITE
    assert "not finite" in failed.error.message
    all_free(d)
