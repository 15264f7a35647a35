"""The block pool: every block accounted for, generations, monotone presence, eviction order."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from crossdock.engine.block_pool import BlockPool, IntegrityError, OutOfBlocks
from crossdock.engine.free_runs import FreeRuns
from crossdock.proto.hashing import BlockHasher

BLOCK = 4
HASHER = BlockHasher(b"the key of these tests", BLOCK)


def names(*chain: int) -> list[bytes]:
    """Names of the blocks of a chain whose i-th block holds the token chain[i], repeated."""
    ids = [token for token in chain for _ in range(BLOCK)]
    return HASHER.chain(ids, HASHER.root(b"layout"))


def fill(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """What a prefill does: takes what is cached, allocates the rest and seals it."""
    table = pool.acquire_prefix(hashes)
    hits = len(table)
    table += pool.allocate(len(hashes) - hits)
    for i in range(hits, len(hashes)):
        pool.seal(table[i], hashes[i], hashes[i - 1] if i else None)
    return table


def stored(pool: BlockPool) -> list[bytes]:
    return [name for _, name in pool.snapshot()[1]]


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


def test_prefix_is_reused_and_counted():
    pool = BlockPool(8, BLOCK)
    hashes = names(1, 2, 3)
    table = fill(pool, hashes)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (5, 0, 3)
    pool.release(table)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (5, 3, 0)
    assert pool.num_available == 8
    other = names(1, 2, 9)
    assert pool.peek_prefix(other) == 2 and pool.num_cached == 3
    assert pool.acquire_prefix(other) == table[:2]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (5, 1, 2)
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
        pool.release(fill(pool, names(*range(100 * i, 100 * i + 16))))
    assert pool.num_free == 0
    assert runs_of(pool.allocate(16)) == 1


def test_generation_is_raised_for_each_new_owner_only():
    generations = np.full(4, 7, dtype=np.int64)
    pool = BlockPool(4, BLOCK, generations=generations)
    assert pool.generations is generations
    hashes = names(1, 2)
    table = fill(pool, hashes)
    assert all(generations[table] == 8)
    pool.release(table)
    assert pool.acquire_prefix(hashes) == table and all(generations[table] == 8)
    pool.release(table)
    pool.allocate(4)
    assert all(generations[table] == 9)


def test_out_of_blocks_takes_nothing():
    pool = BlockPool(4, BLOCK)
    hashes = names(1, 2)
    pool.release(fill(pool, hashes))
    held = pool.allocate(1)
    before = pool.generations.copy()
    with pytest.raises(OutOfBlocks, match="4 KV blocks asked for, 1 free and 2 cached of 4"):
        pool.allocate(4)
    assert (pool.generations == before).all() and pool.peek_prefix(hashes) == 2
    pool.check_integrity([held])


def test_leaves_are_evicted_first_and_the_least_recently_used_leaf_first():
    pool = BlockPool(6, BLOCK)
    a, b = names(1, 2, 3), names(1, 2, 4)
    table_a = fill(pool, a)
    table_b = fill(pool, b)
    lone = fill(pool, names(9))
    pool.release(table_b)
    pool.release(lone)
    pool.release(table_a)
    pool.drain_events()
    pool.allocate(6)
    removed = [name for _, name in pool.drain_events()[1]]
    assert removed == [b[2], names(9)[0], a[2], a[1], a[0]]


def test_using_a_prefix_makes_it_recent():
    pool = BlockPool(4, BLOCK)
    first, second = names(1), names(2)
    pool.release(fill(pool, first))
    pool.release(fill(pool, second))
    pool.release(pool.acquire_prefix(first))
    pool.allocate(3)
    assert stored(pool) == first


def test_a_name_prefers_a_block_in_use():
    """Two sequences compute the same block at once: one copy is kept, whoever leaves first."""
    pool = BlockPool(8, BLOCK)
    p, c = names(1, 2)
    one, two = pool.allocate(1), pool.allocate(2)
    pool.seal(one[0], p, None)
    pool.seal(two[0], p, None)
    pool.seal(two[1], c, p)
    pool.check_integrity([one, two])
    pool.release(one)
    assert (pool.num_free, pool.num_cached) == (6, 0)
    assert pool.acquire_prefix([p, c]) == two
    pool.release(two)
    pool.release(two)
    assert (pool.num_free, pool.num_cached) == (6, 2)
    fresh = pool.allocate(1)
    pool.seal(fresh[0], p, None)  # the cached copy makes room
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 1, 1)
    assert pool.acquire_prefix([p]) == fresh
    assert pool.drain_events() == (0, [(True, p), (True, c)])
    pool.check_integrity([fresh, fresh])


def test_a_child_without_its_parent_stays_unnamed():
    pool = BlockPool(4, BLOCK)
    p, c = names(1, 2)
    table = pool.allocate(2)
    pool.seal(table[1], c, p)
    assert stored(pool) == []
    pool.release(table)
    assert pool.num_free == 4
    pool.check_integrity()


def test_all_available_blocks_can_be_allocated_even_under_a_used_tail():
    pool = BlockPool(4, BLOCK)
    p, c, d = names(1, 2, 3)
    table = fill(pool, [p, c, d])
    pool.release(table[:2])
    assert pool.num_available == 3
    taken = pool.allocate(3)
    assert table[2] not in taken and stored(pool) == []
    pool.check_integrity([table[2:], taken])


def test_a_parent_that_gets_a_child_while_cached_is_no_leaf_any_more():
    pool = BlockPool(4, BLOCK)
    p, c, other = *names(1, 2), *names(3)
    pool.release(fill(pool, [p]))
    pool.release(fill(pool, [other]))
    table = pool.allocate(2)
    pool.seal(table[0], c, p)
    table += pool.allocate(1)
    assert set(stored(pool)) == {p, c}
    pool.check_integrity([table])


def test_blocks_that_lose_their_name_lose_it_all():
    """Two users of one content below a released head: its room is asked for."""
    pool = BlockPool(4, BLOCK)
    p, c = names(1, 2)
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
    hashes = names(1, 2)
    pool.release(fill(pool, hashes))
    assert pool.num_free == 4 and pool.peek_prefix(hashes) == 0
    assert pool.drain_events() == (0, [])


def test_misuse_is_refused():
    pool = BlockPool(4, BLOCK)
    (block,) = pool.allocate(1)
    pool.seal(block, b"a", None)
    pool.seal(block, b"a", None)
    with pytest.raises(IntegrityError, match="another name"):
        pool.seal(block, b"b", None)
    pool.release([block])
    for misuse in (pool.release, pool.retain):
        with pytest.raises(IntegrityError, match="not in use"):
            misuse([block])
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
    table = fill(pool, names(1, 2))
    with pytest.raises(IntegrityError, match="its owners hold 0"):
        pool.check_integrity()
    with pytest.raises(IntegrityError, match="its owners hold 2"):
        pool.check_integrity([table, table[:1]])
    pool.check_integrity([table])
    pool._references[table[1]] = 0
    pool._name[table[1]] = None
    with pytest.raises(IntegrityError, match="leaked"):
        pool.check_integrity([table[:1]])


def test_events_are_numbered_and_a_gap_shows_when_nobody_drains():
    pool = BlockPool(2, BLOCK)
    for i in range(2000):
        pool.release(fill(pool, names(i)))
    first, events = pool.drain_events()
    assert first > 0 and first + len(events) == 3998  # 2000 stored, 1998 removed
    assert pool.drain_events() == (3998, [])
    assert pool.snapshot() == (3996, [(True, n) for i in (1998, 1999) for n in names(i)])


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


# -- the pool, by random walks ---------------------------------------------------------------


class Replay:
    """What a reader of the events knows. Fails on an event that breaks monotone presence."""

    def __init__(self) -> None:
        self.parents: dict[bytes, bytes | None] = {}
        self.present: set[bytes] = set()
        self.expected = 0

    def apply(self, first: int, events: list[tuple[bool, bytes]]) -> None:
        assert first == self.expected
        self.expected += len(events)
        for is_stored, name in events:
            if is_stored:
                parent = self.parents[name]
                assert name not in self.present
                assert parent is None or parent in self.present
                self.present.add(name)
            else:
                self.present.remove(name)
                assert not any(self.parents[other] == name for other in self.present)


chains = st.lists(st.integers(0, 2), min_size=1, max_size=6)


class Sequences(RuleBasedStateMachine):
    """Owners of whole chains, as schedulers and leases are; the oracle knows the LRU order."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(14, BLOCK)
        self.replay = Replay()
        self.held: list[tuple[list[int], list[bytes]]] = []  # (table, names of its sealed blocks)
        self.last_use: dict[bytes, int] = {}
        self.now = 0
        self.generations = self.pool.generations.copy()

    def in_use(self) -> set[bytes]:
        return {name for _, hashes in self.held for name in hashes}

    def check_removed_are_lru_leaves(self) -> None:
        first, events = self.pool.drain_events()
        in_use, present = self.in_use(), set(self.replay.present)
        for is_stored, name in events:
            if is_stored:
                present.add(name)
                continue
            inner = {self.replay.parents[other] for other in present}
            leaves = present - inner - in_use
            assert name in leaves
            assert self.last_use[name] == min(self.last_use[leaf] for leaf in leaves)
            present.remove(name)
        self.replay.apply(first, events)

    def allocate(self, n: int) -> list[int]:
        references = [id_ for table, _ in self.held for id_ in table]
        before = self.pool.generations.copy()
        blocks = self.pool.allocate(n)
        assert len(set(blocks)) == n and not set(blocks) & set(references)
        raised = np.flatnonzero(self.pool.generations != before)
        assert sorted(blocks) == list(raised)
        assert (self.pool.generations[blocks] == before[blocks] + 1).all()
        return blocks

    @rule(target=tables, chain=chains, sealed=st.integers(0, 6), tail=st.integers(0, 2))
    def start(self, chain, sealed, tail):
        hashes = names(*chain)
        self.replay.parents.update(zip(hashes, [None, *hashes]))
        expected = self.pool.peek_prefix(hashes)
        table = self.pool.acquire_prefix(hashes)
        assert len(table) == expected
        owner = (table, list(hashes[:expected]))
        self.held.append(owner)
        need = len(hashes) - len(table) + tail
        if need > self.pool.num_available:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(need)
            self.held = [other for other in self.held if other is not owner]
            self.release(table, owner[1])
            return multiple()
        table += self.allocate(need)
        self.check_removed_are_lru_leaves()
        for i in range(expected, min(sealed, len(hashes))):
            self.pool.seal(table[i], hashes[i], hashes[i - 1] if i else None)
            owner[1].append(hashes[i])
        return owner

    @rule(target=tables, owner=tables)
    def share(self, owner):
        self.pool.retain(owner[0])
        copy = (list(owner[0]), list(owner[1]))
        self.held.append(copy)
        return copy

    @rule(owner=consumes(tables))
    def finish(self, owner):
        self.held = [other for other in self.held if other is not owner]
        self.release(*owner)

    def release(self, table: list[int], hashes: list[bytes]) -> None:
        self.now += 1
        self.pool.release(table)
        for name in set(hashes) - self.in_use():
            self.last_use[name] = self.now

    @precondition(lambda self: self.pool.num_available)
    @rule(data=st.data())
    def fill_up(self, data):
        n = data.draw(st.integers(1, self.pool.num_available))
        self.pool.release(self.allocate(n))
        self.check_removed_are_lru_leaves()

    @invariant()
    def all_is_accounted_for(self):
        self.pool.check_integrity([table for table, _ in self.held])
        self.check_removed_are_lru_leaves()
        assert set(stored(self.pool)) == self.replay.present
        assert self.in_use() <= self.replay.present
        assert (self.pool.generations >= self.generations).all()
        self.generations = self.pool.generations.copy()
        used = {id_ for table, _ in self.held for id_ in table}
        assert self.pool.num_used == len(used)
        assert self.pool.num_available == 14 - len(used)


short_chains = st.lists(st.integers(0, 1), min_size=1, max_size=3)


class Blocks(RuleBasedStateMachine):
    """Owners of single blocks who seal and release in any order: nothing may leak or go missing."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, BLOCK)
        self.replay = Replay()
        self.held: list[int] = []

    @rule(target=blocks, n=st.integers(1, 10))
    def allocate(self, n):
        if n > self.pool.num_available:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(n)
            return multiple()
        taken = self.pool.allocate(n)
        assert not set(taken) & set(self.held)
        self.held += taken
        return multiple(*taken)

    @rule(target=blocks, chain=short_chains)
    def acquire(self, chain):
        taken = self.pool.acquire_prefix(names(*chain))
        self.held += taken
        return multiple(*taken)

    @rule(target=blocks, block=blocks)
    def retain(self, block):
        self.pool.retain([block])
        self.held.append(block)
        return block

    @rule(block=consumes(blocks))
    def release(self, block):
        self.pool.release([block])
        self.held.remove(block)

    @rule(block=blocks, chain=short_chains)
    def seal(self, block, chain):
        hashes = names(*chain)
        self.replay.parents.update(zip(hashes, [None, *hashes]))
        if self.pool._name[block] is None:
            self.pool.seal(block, hashes[-1], hashes[-2] if len(hashes) > 1 else None)

    @invariant()
    def all_is_accounted_for(self):
        self.pool.check_integrity([[block] for block in self.held])
        self.replay.apply(*self.pool.drain_events())
        assert set(stored(self.pool)) == self.replay.present
        assert self.pool.num_available == 10 - len(set(self.held))


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
