"""Prompts that let others go first, in the prefill scheduler."""

from __future__ import annotations

from itertools import count

from test_schedulers import sequence

from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Sequence
from crossdock.prefill.scheduler import YIELDED_STEPS, PrefillScheduler
from crossdock.proto.steps import Yields

_numbers = count()


def unlike(tokens: int) -> Sequence:
    """A prompt that shares no prefix with others."""
    first = 10_000 * next(_numbers)
    return sequence(list(range(first, first + tokens)))


def test_a_prompt_that_yields_has_what_the_others_leave() -> None:
    pool = BlockPool(1000, 16)
    scheduler = PrefillScheduler(pool, chunk_tokens=64)
    late = unlike(400)
    late.yields = Yields.LATE
    scheduler.add(late)

    def lengths() -> dict[str, int]:
        plan = scheduler.schedule()
        for chunk in plan.chunks:
            scheduler.computed(chunk)
        return {chunk.sequence.sequence_id: chunk.length for chunk in plan.chunks}

    assert lengths() == {late.sequence_id: 16}, "a short one, so that nobody waits for long"
    others = [unlike(96), unlike(10)]
    for each in others:
        scheduler.add(each)
    assert scheduler.queued.late_tokens == 384
    first, second = others
    assert lengths() == {first.sequence_id: 64}
    assert lengths() == {first.sequence_id: 32, second.sequence_id: 10}, "nor is a step longer"
    assert lengths() == {late.sequence_id: 16}
    steps = [unlike(64) for _ in range(40)]
    for each in steps:
        scheduler.add(each)
    had = [late.sequence_id in lengths() for _ in range(40)]
    assert sum(had) == 40 // (YIELDED_STEPS + 1), "nobody starves"


def test_one_of_many_goes_before_one_that_is_late_and_after_all_others() -> None:
    scheduler = PrefillScheduler(BlockPool(1000, 16), chunk_tokens=64)
    late, of_many = unlike(400), unlike(400)
    late.yields, of_many.yields = Yields.LATE, Yields.OF_MANY

    def next_one() -> Sequence:
        (chunk,) = scheduler.schedule().chunks
        scheduler.computed(chunk)
        return chunk.sequence

    scheduler.add(late)
    assert next_one() is late
    scheduler.add(of_many)
    assert next_one() is of_many
    queued = scheduler.queued
    assert (queued.yielding_tokens, queued.late_tokens, queued.tokens) == (384, 384, 768)
    urgent = unlike(64)
    scheduler.add(urgent)
    assert next_one() is urgent
    had = [next_one() is late for _ in range(YIELDED_STEPS)]
    assert had == [False] * (YIELDED_STEPS - 2) + [True, False], "who is late does not starve"


def test_several_that_yield_share_no_longer_a_step_than_one_has() -> None:
    """Who comes meanwhile waits for that step, whoever is in it."""
    scheduler = PrefillScheduler(BlockPool(1000, 16), chunk_tokens=64)
    for late in (unlike(10), unlike(400), unlike(400)):
        late.yields = Yields.LATE
        scheduler.add(late)
    plan = scheduler.schedule()
    assert plan is not None and [chunk.length for chunk in plan.chunks] == [10, 6]
