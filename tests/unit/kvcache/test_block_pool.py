"""The block pool: every block accounted for, generations, monotone presence, eviction order."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from block_kit import BLOCK, fill, hashes_of, stored

from crossdock.kvcache.block_pool import TAIL_SHARE, BlockPool, IntegrityError, OutOfBlocks
from crossdock.kvcache.free_runs import FreeRuns


def runs_of(ids: list[int]) -> int:
    return sum(1 for i, id_ in enumerate(ids) if i == 0 or id_ != ids[i - 1] + 1)


# -- free runs -------------------------------------------------------------------------------


def test_free_runs_take_the_tightest_run_that_fits():
    free = FreeRuns(64)
    everything = free.take(64)
    assert everything == list(range(64))
    free.put(range(3))
    free.put(range(10, 16))
    free.put(range(20, 60))
    assert free.take(6) == list(range(10, 16))
    assert free.take(3) == [0, 1, 2]
    assert free.take(2, after=29) == [20, 21]  # nothing starts at 30: the hint is only a hint
    assert free.take(2, after=21) == [22, 23]
    assert len(free) == 36


def test_free_runs_against_a_set():
    rng = random.Random(1)
    free, held = FreeRuns(200), []
    for _ in range(3000):
        if rng.random() < 0.5:
            n = rng.randint(0, min(20, len(free)))
            taken = free.take(n, after=rng.choice([None, *held[:1]]))
            assert len(taken) == n and not set(taken) & set(held)
            held += taken
        else:
            rng.shuffle(held)
            back = [held.pop() for _ in range(rng.randint(0, min(20, len(held))))]
            free.put(back)
        ids = sorted(i for first, n in free.runs() for i in range(first, first + n))
        assert ids == sorted(set(range(200)) - set(held)) and len(ids) == len(free)
        starts = {first for first, _ in free.runs()}
        assert not any(first + n in starts for first, n in free.runs())  # runs are maximal


# -- the pool, by example --------------------------------------------------------------------


def test_a_tail_is_for_who_goes_on_with_its_tokens():
    pool = BlockPool(4, BLOCK)
    hashes = hashes_of(1, 2)
    table = fill(pool, hashes) + pool.allocate(1)
    pool.drain_events()
    pool.keep_tail(table[2], hashes[1], [7, 8])
    assert pool.acquire_tail(hashes[1], [7, 8, 9]) is None, "it is still used"
    pool.release(table)
    assert (pool.num_free, pool.num_evictable) == (1, 3)
    assert stored(pool) == hashes and pool.drain_events()[1] == []
    assert pool.acquire_tail(hashes[1], [7]) is None
    assert pool.acquire_tail(hashes[1], [7, 9, 8]) is None
    assert pool.acquire_tail(hashes[0], [7, 8]) is None
    pool.acquire_prefix(hashes)
    generation = pool.generations[table[2]]
    assert pool.acquire_tail(hashes[1], [7, 8, 9]) == (table[2], 2)
    assert pool.generations[table[2]] == generation + 1
    assert pool.acquire_tail(hashes[1], [7, 8, 9]) is None, "it has an owner"
    pool.check_integrity([table])


def test_a_newer_tail_takes_the_place_of_an_older_and_goes_before_its_parent():
    pool = BlockPool(4, BLOCK)
    hashes = hashes_of(1)
    table = fill(pool, hashes) + pool.allocate(2)
    for block, tokens in zip(table[1:], ([5], [6])):
        pool.keep_tail(block, hashes[0], tokens)
        pool.release([block])
    assert (pool.num_free, pool.num_evictable) == (2, 1)
    pool.release(table[:1])
    pool.release(pool.allocate(3))
    assert pool.peek_prefix(hashes) == 1 and pool.num_evictable == 1
    assert pool.acquire_tail(hashes[0], [6]) is None
    pool.check_integrity()


def test_tails_of_chats_that_nobody_goes_on_with_leave_room_for_full_blocks():
    pool = BlockPool(24, BLOCK)
    heads = [hashes_of(i) for i in range(24)]
    for head in heads:
        table = fill(pool, head) + pool.allocate(1)
        pool.keep_tail(table[1], head[0], [1, 2, 3])
        pool.release(table)
    assert sum(map(pool.peek_prefix, heads)) >= 24 - 24 // TAIL_SHARE - 1  # 12 without a bound
    pool.check_integrity()


def test_prefix_is_reused_and_counted():
    pool = BlockPool(8, BLOCK)
    hashes = hashes_of(1, 2, 3)
    table = fill(pool, hashes)
    assert (pool.num_free, pool.num_evictable, pool.num_used) == (5, 0, 3)
    pool.release(table)
    assert (pool.num_free, pool.num_evictable, pool.num_used) == (5, 3, 0)
    assert pool.num_available == 8
    other = hashes_of(1, 2, 9)
    assert pool.peek_prefix(other) == 2 and pool.num_evictable == 3
    assert pool.acquire_prefix(other) == table[:2]
    assert (pool.num_free, pool.num_evictable, pool.num_used) == (5, 1, 2)
    pool.check_integrity([table[:2]])


def test_allocation_is_consecutive_and_continues_a_run():
    pool = BlockPool(100, BLOCK)
    first, second = pool.allocate(10), pool.allocate(10)
    assert runs_of(first) == runs_of(second) == 1
    pool.release(second)
    assert first + pool.allocate(5, after=first[-1]) == list(range(15))


def test_evicted_chains_come_back_as_one_run():
    pool = BlockPool(64, BLOCK)
    for i in range(4):
        pool.release(fill(pool, hashes_of(*range(100 * i, 100 * i + 16))))
    assert pool.num_free == 0
    assert runs_of(pool.allocate(16)) == 1


def test_generation_is_raised_for_each_new_owner_only():
    generations = np.full(4, 7, dtype=np.int64)
    pool = BlockPool(4, BLOCK, generations=generations)
    assert pool.generations is generations
    hashes = hashes_of(1, 2)
    table = fill(pool, hashes)
    assert all(generations[table] == 8)
    pool.release(table)
    assert pool.acquire_prefix(hashes) == table and all(generations[table] == 8)
    pool.release(table)
    pool.allocate(4)
    assert all(generations[table] == 9)


def test_out_of_blocks_takes_nothing():
    pool = BlockPool(4, BLOCK)
    hashes = hashes_of(1, 2)
    pool.release(fill(pool, hashes))
    held = pool.allocate(1)
    before = pool.generations.copy()
    with pytest.raises(OutOfBlocks, match="4 KV blocks asked for, 1 free and 2 cached of 4"):
        pool.allocate(4)
    assert (pool.generations == before).all() and pool.peek_prefix(hashes) == 2
    pool.check_integrity([held])


def test_leaves_are_evicted_first_and_the_least_recently_used_leaf_first():
    pool = BlockPool(6, BLOCK)
    a, b = hashes_of(1, 2, 3), hashes_of(1, 2, 4)
    table_a = fill(pool, a)
    table_b = fill(pool, b)
    lone = fill(pool, hashes_of(9))
    pool.release(table_b)
    pool.release(lone)
    pool.release(table_a)
    pool.drain_events()
    pool.allocate(6)
    removed = [block_hash for _, block_hash in pool.drain_events()[1]]
    assert removed == [b[2], hashes_of(9)[0], a[2], a[1], a[0]]


def test_using_a_prefix_makes_it_recent():
    pool = BlockPool(4, BLOCK)
    first, second = hashes_of(1), hashes_of(2)
    pool.release(fill(pool, first))
    pool.release(fill(pool, second))
    pool.release(pool.acquire_prefix(first))
    pool.allocate(3)
    assert stored(pool) == first


def test_of_blocks_with_one_hash_a_used_one_is_cached():
    """Two sequences compute the same block at once: one copy is kept, whoever leaves first."""
    pool = BlockPool(8, BLOCK)
    p, c = hashes_of(1, 2)
    one, two = pool.allocate(1), pool.allocate(2)
    pool.seal(one[0], p, None)
    pool.seal(two[0], p, None)
    pool.seal(two[1], c, p)
    pool.check_integrity([one, two])
    pool.release(one)
    assert (pool.num_free, pool.num_evictable) == (6, 0)
    assert pool.acquire_prefix([p, c]) == two
    pool.release(two)
    pool.release(two)
    assert (pool.num_free, pool.num_evictable) == (6, 2)
    fresh = pool.allocate(1)
    pool.seal(fresh[0], p, None)  # the cached copy makes room
    assert (pool.num_free, pool.num_evictable, pool.num_used) == (6, 1, 1)
    assert pool.acquire_prefix([p]) == fresh
    assert pool.drain_events() == (0, [(True, p), (True, c)])
    pool.check_integrity([fresh, fresh])


def test_a_child_without_its_parent_is_not_cached():
    pool = BlockPool(4, BLOCK)
    p, c = hashes_of(1, 2)
    table = pool.allocate(2)
    pool.seal(table[1], c, p)
    assert stored(pool) == []
    pool.release(table)
    assert pool.num_free == 4
    pool.check_integrity()


def test_all_available_blocks_can_be_allocated_even_under_a_used_tail():
    pool = BlockPool(4, BLOCK)
    p, c, d = hashes_of(1, 2, 3)
    table = fill(pool, [p, c, d])
    pool.release(table[:2])
    assert pool.num_available == 3
    taken = pool.allocate(3)
    assert table[2] not in taken and stored(pool) == []
    pool.check_integrity([table[2:], taken])


def test_a_parent_that_gets_a_child_while_cached_is_no_leaf_any_more():
    pool = BlockPool(4, BLOCK)
    p, c, other = *hashes_of(1, 2), *hashes_of(3)
    pool.release(fill(pool, [p]))
    pool.release(fill(pool, [other]))
    table = pool.allocate(2)
    pool.seal(table[0], c, p)
    table += pool.allocate(1)
    assert set(stored(pool)) == {p, c}
    pool.check_integrity([table])


def test_blocks_with_one_hash_leave_the_cache_together():
    """Two users of one content below a released head: its room is asked for."""
    pool = BlockPool(4, BLOCK)
    p, c = hashes_of(1, 2)
    table = fill(pool, [p, c])
    twin = pool.allocate(1)
    pool.seal(twin[0], c, p)
    pool.release(table[:1])
    table = table[1:] + pool.allocate(2)
    assert stored(pool) == []
    pool.check_integrity([table, twin])
    pool.release(twin)
    assert pool.num_free == 1


def test_without_a_prefix_cache_nothing_is_kept():
    pool = BlockPool(4, BLOCK, prefix_cache=False)
    hashes = hashes_of(1, 2)
    pool.release(fill(pool, hashes))
    assert pool.num_free == 4 and pool.peek_prefix(hashes) == 0
    assert pool.drain_events() == (0, [])


def test_misuse_is_refused():
    pool = BlockPool(4, BLOCK)
    (block,) = pool.allocate(1)
    pool.seal(block, b"a", None)
    pool.seal(block, b"a", None)
    with pytest.raises(IntegrityError, match="another hash"):
        pool.seal(block, b"b", None)
    pool.release([block])
    with pytest.raises(IntegrityError, match="not in use"):
        pool.release([block])
    with pytest.raises(IntegrityError, match="not in use"):
        pool.seal(block, b"a", None)
    with pytest.raises(ValueError, match="n=-1"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="num_blocks=0"):
        BlockPool(0, BLOCK)
    with pytest.raises(ValueError, match="int32"):
        BlockPool(4, BLOCK, generations=np.zeros(4, dtype=np.int32))


def test_integrity_check_sees_what_is_wrong():
    pool = BlockPool(4, BLOCK)
    table = fill(pool, hashes_of(1, 2))
    with pytest.raises(IntegrityError, match="its owners hold 0"):
        pool.check_integrity()
    with pytest.raises(IntegrityError, match="its owners hold 2"):
        pool.check_integrity([table, table[:1]])
    pool.check_integrity([table])
    pool._references[table[1]] = 0
    pool._hash_of[table[1]] = None
    with pytest.raises(IntegrityError, match="leaked"):
        pool.check_integrity([table[:1]])


def test_events_are_numbered_and_a_gap_shows_when_nobody_drains():
    pool = BlockPool(2, BLOCK)
    for i in range(2000):
        pool.release(fill(pool, hashes_of(i)))
    first, events = pool.drain_events()
    assert first > 0 and first + len(events) == 3998  # 2000 stored, 1998 removed
    assert pool.drain_events() == (3998, [])
    assert pool.snapshot() == (3996, [(True, n) for i in (1998, 1999) for n in hashes_of(i)])


def test_operations_do_not_slow_down_with_the_pool():
    """A full pool of 100,000 cached blocks, 16 evicted and stored per round."""

    def round_time(num_blocks: int) -> float:
        pool = BlockPool(num_blocks, BLOCK)
        for i in range(num_blocks // 16):
            pool.release(fill(pool, [b"%d.%d" % (i, k) for k in range(16)]))
        assert pool.num_free == 0
        times = []
        for i in range(300):
            chain = [b"x%d.%d" % (i, k) for k in range(16)]
            start = time.perf_counter()
            pool.release(fill(pool, chain))
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    assert round_time(96_000) < 10 * round_time(960)
