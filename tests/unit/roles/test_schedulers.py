"""The prefill and decode schedulers over a real BlockPool, without a model."""

from __future__ import annotations

import math
from itertools import count

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from crossdock.decode.scheduler import DecodeScheduler
from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Sequence, StepPlan, finish_of
from crossdock.prefill.scheduler import PrefillScheduler
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.types import FinishReason, SamplingParams

BLOCK = 16
HASHER = BlockHasher(b"the key of these tests", BLOCK)
ROOT = HASHER.root(b"layout")
_arrivals = count()


def sequence(
    tokens: int | list[int], *, priority: int = 0, max_tokens: int = 100, **sampling: object
) -> Sequence:
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    arrival = next(_arrivals)
    return Sequence(
        sequence_id=f"s{arrival}",
        token_ids=ids,
        prompt_tokens=len(ids),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        eos_token_ids=frozenset({2}),
        block_hashes=HASHER.chain(ids, ROOT),
        root_hash=ROOT,
        priority=priority,
        arrival=arrival,
    )


def shape(plan: StepPlan | None) -> list[tuple[str, int, int, bool]]:
    chunks = plan.chunks if plan else ()
    return [(c.sequence.sequence_id, c.start, c.length, c.sample) for c in chunks]


def prefill_step(
    scheduler: PrefillScheduler, together: float = math.inf
) -> list[tuple[str, int, int, bool]]:
    plan = scheduler.schedule(together)
    for chunk in plan.chunks if plan else ():
        scheduler.computed(chunk)
    return shape(plan)


# -- prefill -----------------------------------------------------------------------------------


def test_prefill_chunks_fill_the_budget_in_order_of_arrival() -> None:
    scheduler = PrefillScheduler(BlockPool(64, BLOCK), chunk_tokens=100)
    a, b = sequence([7] * 130), sequence([8] * 50)
    scheduler.add(a)
    scheduler.add(b)
    assert scheduler.queued.tokens == 180
    assert prefill_step(scheduler) == [(a.sequence_id, 0, 100, False)]
    assert prefill_step(scheduler) == [(a.sequence_id, 100, 30, True), (b.sequence_id, 0, 50, True)]
    assert prefill_step(scheduler) == []
    assert scheduler.waiting == scheduler.running == scheduler.queued.tokens == 0


def test_prompts_share_a_step_only_as_far_as_that_saves_time() -> None:
    scheduler = PrefillScheduler(BlockPool(64, BLOCK), chunk_tokens=100)
    a, b, c = sequence([7] * 130), sequence([8] * 50), sequence([9] * 10)
    for prompt in (a, b, c):
        scheduler.add(prompt)
    assert prefill_step(scheduler, 40) == [(a.sequence_id, 0, 100, False)], "one alone has it all"
    assert prefill_step(scheduler, 40) == [
        (a.sequence_id, 100, 30, True),
        (b.sequence_id, 0, 10, False),
    ]
    assert prefill_step(scheduler, 40) == [(b.sequence_id, 10, 40, True)]
    assert prefill_step(scheduler, 40) == [(c.sequence_id, 0, 10, True)]


def test_cached_tokens_of_waiting_prompts_are_not_queued() -> None:
    pool = BlockPool(64, BLOCK)
    prefill = PrefillScheduler(pool, chunk_tokens=100)
    prompts = [sequence([7] * 90 + [i] * 10) for i in range(4)]
    for prompt in prompts:
        prefill.add(prompt)
    assert prefill.queued.tokens == 400
    prefill_step(prefill)
    assert prefill.queued.tokens == 3 * 20  # 5 of 6 full blocks are those of the first
    decode = DecodeScheduler(pool, max_batch=0, chunk_tokens=100)
    decode.add(sequence([7] * 80))
    decode.add(sequence([9] * 50))
    assert decode.queued.tokens == 16 + 50, "the last token is always computed"


def test_prefill_priority_goes_first() -> None:
    scheduler = PrefillScheduler(BlockPool(64, BLOCK), chunk_tokens=32)
    late, urgent = sequence(32), sequence([9] * 32, priority=-1)
    scheduler.add(late)
    scheduler.add(urgent)
    assert [row[0] for row in prefill_step(scheduler)] == [urgent.sequence_id]


def test_prefill_finds_what_the_prompt_before_it_computed_but_computes_its_last_token() -> None:
    scheduler = PrefillScheduler(BlockPool(64, BLOCK), chunk_tokens=64)
    first, second = sequence(64), sequence(64)
    scheduler.add(first)
    scheduler.add(second)
    assert prefill_step(scheduler) == [(first.sequence_id, 0, 64, True)]
    # All four blocks are cached; the last is computed again for its logits.
    assert prefill_step(scheduler) == [(second.sequence_id, 48, 16, True)]
    assert second.num_cached == 48
    assert second.block_table[:3] == first.block_table[:3]


def test_prefill_waits_for_blocks_and_takes_none_meanwhile() -> None:
    pool = BlockPool(4, BLOCK, prefix_cache=False)
    scheduler = PrefillScheduler(pool, chunk_tokens=64)
    first, second = sequence([5] * 40), sequence([6] * 40)
    scheduler.add(first)
    scheduler.add(second)
    assert [row[0] for row in prefill_step(scheduler)] == [first.sequence_id]
    assert prefill_step(scheduler) == []
    pool.check_integrity([first.block_table])
    block_tables.release(pool, first)
    assert [row[0] for row in prefill_step(scheduler)] == [second.sequence_id]


def cached(pool: BlockPool, token: int, blocks: int) -> Sequence:
    """A prompt whose KV is in the prefix cache and that nobody uses."""
    made = sequence([token] * (blocks * BLOCK))
    block_tables.grow(pool, made, made.num_tokens)
    made.num_computed = made.num_tokens
    block_tables.seal_full(pool, made)
    block_tables.release(pool, made)
    return made


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_blocked_head_of_the_queue_leaves_its_prefix_as_old_as_it_was(kind: str) -> None:
    pool = BlockPool(8, BLOCK)
    wanted, other = cached(pool, 5, 2), cached(pool, 6, 2)
    holder = sequence([7] * (4 * BLOCK))
    block_tables.grow(pool, holder, holder.num_tokens)
    head = sequence([5] * (7 * BLOCK))  # its two cached blocks and five more: only two are there
    prefill = PrefillScheduler(pool, chunk_tokens=64)
    decode = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    scheduler = prefill if kind == "prefill" else decode
    scheduler.add(head)

    def turn() -> object:
        return prefill.schedule() if kind == "prefill" else decode.reserve()[0]

    for _ in range(3):
        assert not turn()
    assert pool.num_used == 4 and not head.block_table
    pool.release(pool.allocate(2))  # evicts the least recently used: the head's, not the other's
    assert pool.peek_prefix(wanted.block_hashes) == 0
    assert pool.peek_prefix(other.block_hashes) == 2
    block_tables.release(pool, holder)
    assert turn() or scheduler.running == 1
    pool.check_integrity(scheduler.held)


def test_a_pool_fits_a_prefix_that_is_cached_in_use_or_absent() -> None:
    pool = BlockPool(8, BLOCK)
    prefix = cached(pool, 5, 4)
    assert pool.fits(prefix.block_hashes, 8) and not pool.fits(prefix.block_hashes, 9)
    taken = pool.acquire_prefix(prefix.block_hashes[:3])
    assert pool.fits(prefix.block_hashes, 8) and not pool.fits([], 6)
    assert pool.fits([], 5) and not pool.fits(prefix.block_hashes, 9)
    pool.release(taken)


@pytest.mark.parametrize("steps", [0, 1])
def test_prefill_remove_frees_everything(steps: int) -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = PrefillScheduler(pool, chunk_tokens=32)
    victim = sequence(100)
    scheduler.add(victim)
    for _ in range(steps):
        prefill_step(scheduler)
    scheduler.remove(victim)
    assert scheduler.schedule() is None
    assert pool.num_used == 0
    pool.check_integrity(scheduler.held)


# -- decode ------------------------------------------------------------------------------------


def handed_off(tokens: int, **options: int) -> tuple[Sequence, int]:
    """A sequence with token 0 drawn, and the number of tokens its ticket covers."""
    made = sequence(tokens, **options)
    draw(made, 3)
    return made, tokens


def joined(scheduler: DecodeScheduler, tokens: int) -> Sequence:
    """A sequence that runs, from its next step on."""
    made, covered = handed_off(tokens)
    scheduler.add(made, remote_tokens=covered)
    assert scheduler.reserve() == ([made], [])
    scheduler.join(made)
    return made


def draw(sequence: Sequence, token: int) -> None:
    sequence.token_ids.append(token)
    HASHER.extend(sequence.block_hashes, sequence.token_ids, ROOT)


def decode_step(scheduler: DecodeScheduler, token: int = 3) -> list[Sequence]:
    plan, preempted = scheduler.schedule()
    for chunk in plan.chunks if plan else ():
        scheduler.computed(chunk)
        if chunk.sample:
            draw(chunk.sequence, token)
    return preempted


def test_decode_reserves_pulls_joins_and_recomputes_nothing() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    seq, covered = handed_off(40)
    scheduler.add(seq, remote_tokens=covered)
    assert scheduler.reserve()[0] == [seq]
    assert (seq.num_sealed, len(seq.block_table)) == (0, 3)
    assert scheduler.schedule() == (None, [])
    scheduler.join(seq)
    plan, _ = scheduler.schedule()
    assert shape(plan) == [(seq.sequence_id, 40, 1, True)]


def test_decode_pulls_only_what_its_prefix_cache_lacks() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    first = joined(scheduler, 40)
    second, covered = handed_off(40)
    scheduler.add(second, remote_tokens=covered)
    assert scheduler.reserve()[0] == [second]
    assert second.num_sealed == 2
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]


def test_decode_caches_generated_blocks_for_the_next_turn() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    seq = joined(scheduler, 30)
    for _ in range(10):
        decode_step(scheduler)
    next_turn = HASHER.chain(seq.token_ids, ROOT)
    assert pool.peek_prefix(next_turn) == 2


def test_decode_goes_on_in_the_middle_of_the_last_turns_last_block() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    last = joined(scheduler, 30)
    for _ in range(10):
        decode_step(scheduler)
    table, history = list(last.block_table), last.num_tokens
    scheduler.ended(last)
    scheduler.remove(last)
    pool.check_integrity()
    following = sequence(0)
    following.token_ids = [*last.token_ids, *range(100, 105)]
    HASHER.extend(following.block_hashes, following.token_ids, ROOT)
    scheduler.add(following)
    scheduler.reserve()
    assert following.block_table == table
    assert following.num_cached == history - 1, "the last token's KV was never needed"
    plan, _ = scheduler.schedule()
    assert shape(plan) == [(following.sequence_id, history - 1, 6, True)]
    pool.check_integrity(scheduler.held)


def test_decode_computes_a_prompt_without_a_ticket_beside_decodes() -> None:
    pool = BlockPool(32, BLOCK)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=50)
    running = joined(scheduler, 20)
    local = sequence([4] * 60)
    scheduler.add(local)
    assert scheduler.reserve()[0] == []
    plan, _ = scheduler.schedule()
    assert shape(plan) == [(running.sequence_id, 20, 1, True), (local.sequence_id, 0, 49, False)]
    assert scheduler.queued.tokens == 60


def test_decode_leaves_a_share_of_every_step_to_prompts_however_many_decode() -> None:
    scheduler = DecodeScheduler(BlockPool(64, BLOCK), max_batch=32, chunk_tokens=16)
    for _ in range(20):
        joined(scheduler, 8)
    local = sequence([4] * 10)
    scheduler.add(local)
    scheduler.reserve()
    steps = []
    for _ in range(3):
        plan, preempted = scheduler.schedule()
        assert plan and not preempted
        decodes = [c for c in plan.chunks if c.sequence is not local]
        assert len(decodes) == 20  # nobody who decodes waits for it
        steps += [c.length for c in plan.chunks if c.sequence is local]
        for chunk in plan.chunks:
            scheduler.computed(chunk)
            if chunk.sample:
                chunk.sequence.token_ids.append(3)
    assert steps == [4, 4, 2]


def test_decode_preempts_the_youngest_not_who_came_back_from_preemption() -> None:
    pool = BlockPool(5, BLOCK, prefix_cache=False)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    returned, covered = handed_off(30)  # arrived first, was preempted elsewhere, and joins last
    newer, _ = handed_off(30)
    for seq in (newer, returned):
        scheduler.add(seq, remote_tokens=covered)
        for reserved in scheduler.reserve()[0]:
            scheduler.join(reserved)
    preempted: list[Sequence] = []
    while not preempted:
        preempted = decode_step(scheduler)
    assert preempted == [newer]


def test_of_equal_arrival_the_last_to_join_is_preempted() -> None:
    pool = BlockPool(5, BLOCK, prefix_cache=False)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    pairs = [handed_off(30) for _ in range(2)]
    for seq, covered in pairs:  # two continuations of one request
        seq.arrival = 0.0
        scheduler.add(seq, remote_tokens=covered)
    for seq in scheduler.reserve()[0]:
        scheduler.join(seq)
    preempted: list[Sequence] = []
    while not preempted:
        preempted = decode_step(scheduler)
    assert preempted == [pairs[1][0]]


def test_decode_preempts_the_last_in_order_and_frees_its_blocks() -> None:
    pool = BlockPool(5, BLOCK, prefix_cache=False)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=64)
    old, young = (joined(scheduler, 30) for _ in range(2))
    preempted: list[Sequence] = []
    while not preempted:
        preempted = decode_step(scheduler)
    assert preempted == [young]
    assert young.block_table == []
    pool.check_integrity(scheduler.held)
    assert scheduler.running == 1 and old.num_tokens > 31


def reserved_early(scheduler: DecodeScheduler, tokens: int) -> Sequence:
    """A sequence whose prompt is still being computed: token 0 is not there yet."""
    made = sequence(tokens)
    scheduler.add(made, remote_tokens=tokens)
    return made


def test_decode_preempts_early_reservations_before_anybody_who_runs() -> None:
    pool = BlockPool(8, BLOCK, prefix_cache=False)
    scheduler = DecodeScheduler(pool, max_batch=8, chunk_tokens=64)
    running = joined(scheduler, 15)
    first, second = reserved_early(scheduler, 30), reserved_early(scheduler, 30)
    assert scheduler.reserve()[0] == [first, second]
    while pool.num_available:
        assert not decode_step(scheduler)
    for _ in range(BLOCK):
        plan, preempted = scheduler.schedule([first, second])
        assert shape(plan) == [(running.sequence_id, running.num_tokens - 1, 1, True)]
        if preempted:
            break
        scheduler.computed(plan.chunks[0])
        draw(running, 3)
    assert preempted == [second] and not second.block_table
    pool.check_integrity(scheduler.held)


def test_decode_lets_who_is_complete_pass_an_early_reservation_without_room() -> None:
    pool = BlockPool(8, BLOCK, prefix_cache=False)
    scheduler = DecodeScheduler(pool, max_batch=8, chunk_tokens=64)
    running = joined(scheduler, 64)
    unready, unready_too = reserved_early(scheduler, 64), reserved_early(scheduler, 10)
    ready, covered = handed_off(10)
    scheduler.add(ready, remote_tokens=covered)
    assert scheduler.reserve()[0] == [ready]
    draw(unready, 3)  # its token 0: from now on it is its turn
    later, covered = handed_off(2)
    scheduler.add(later, remote_tokens=covered)
    assert scheduler.reserve()[0] == []
    scheduler.remove(running)
    assert scheduler.reserve()[0] == [unready]
    assert unready_too in scheduler._waiting and later in scheduler._waiting


@pytest.mark.parametrize("short_of", ["places", "blocks"])
def test_an_early_reservation_gives_way_to_who_is_complete(short_of: str) -> None:
    """Else one would wait for a prompt that is still computed elsewhere, and nobody would run."""
    places = 2 if short_of == "places" else 8
    pool = BlockPool(16 if short_of == "places" else 6, BLOCK, prefix_cache=False)
    scheduler = DecodeScheduler(pool, max_batch=places, chunk_tokens=64)
    reading, idle = reserved_early(scheduler, 20), reserved_early(scheduler, 20)
    assert scheduler.reserve() == ([reading, idle], [])
    another = reserved_early(scheduler, 20)
    first, covered = handed_off(20)
    scheduler.add(first, remote_tokens=covered)
    local = sequence([4] * 20)  # complete, too: nothing of it is computed elsewhere
    scheduler.add(local)
    assert scheduler.reserve([idle]) == ([first], [idle]), "nobody who reads, nor for the early one"
    assert not idle.block_table and scheduler.running == 0
    pool.check_integrity(scheduler.held)
    assert scheduler.reserve([]) == ([], []), "the next one waits until the last read is over"
    assert scheduler.reserve([reading]) == ([], [reading])
    assert scheduler.running == 1 and local.block_table and not another.block_table
    pool.check_integrity(scheduler.held)


def test_decode_holds_to_max_batch() -> None:
    scheduler = DecodeScheduler(BlockPool(64, BLOCK), max_batch=2, chunk_tokens=64)
    for _ in range(3):
        seq, covered = handed_off(8)
        scheduler.add(seq, remote_tokens=covered)
    assert len(scheduler.reserve()[0]) == 2
    assert scheduler.waiting == 3


@examples(60)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=8),
    blocks=st.integers(8, 24),
    budget=st.integers(4, 64),
)
def test_decode_always_ends_and_accounts_for_every_block(
    prompts: list[tuple[int, int]], blocks: int, budget: int
) -> None:
    """Preempted sequences come back, as the gateway brings them; all of them end."""
    pool = BlockPool(blocks, BLOCK)
    scheduler = DecodeScheduler(pool, max_batch=4, chunk_tokens=budget)
    goal = {}
    for length, more in prompts:
        seq = sequence([length] * length)
        goal[seq.sequence_id] = length + min(more, blocks * BLOCK - length)
        scheduler.add(seq)
    for _ in range(5000):
        scheduler.reserve()
        plan, preempted = scheduler.schedule()
        for seq in preempted:
            scheduler.add(seq)
        for chunk in plan.chunks if plan else ():
            scheduler.computed(chunk)
            if chunk.sample:
                draw(chunk.sequence, 1)
                if chunk.sequence.num_tokens >= goal[chunk.sequence.sequence_id]:
                    scheduler.remove(chunk.sequence)
        pool.check_integrity(scheduler.held)
        if not scheduler.running and not scheduler.waiting:
            break
    assert scheduler.running == scheduler.waiting == 0
    assert pool.num_used == 0


# -- the end of a sequence -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "options", "expected"),
    [
        (2, {}, (FinishReason.STOP, "")),
        (2, {"ignore_eos": True}, None),
        (2, {"min_tokens": 2}, None),
        (9, {"stop_token_ids": (9,)}, (FinishReason.STOP, "9")),
        (5, {"max_tokens": 1}, (FinishReason.LENGTH, "")),
        (5, {}, None),
    ],
)
def test_finish_of(token: int, options: dict[str, object], expected: object) -> None:
    seq = sequence(4, **options)  # type: ignore[arg-type]
    seq.token_ids.append(token)
    assert finish_of(seq, context_length=100) == expected
    assert finish_of(seq, context_length=5) == (expected or (FinishReason.LENGTH, ""))
