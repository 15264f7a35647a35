"""The block pool by random walks: nothing leaks, and no event breaks monotone presence."""

from __future__ import annotations

import numpy as np
import pytest
from block_kit import BLOCK, hashes_of, stored
from examples import examples
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

from crossdock.kvcache.block_pool import BlockPool, OutOfBlocks


class Replay:
    """What a reader of the events knows. Fails on an event that breaks monotone presence."""

    def __init__(self) -> None:
        self.parents: dict[bytes, bytes | None] = {}
        self.present: set[bytes] = set()
        self.expected = 0

    def apply(self, first: int, events: list[tuple[bool, bytes]]) -> None:
        assert first == self.expected
        self.expected += len(events)
        for is_stored, block_hash in events:
            if is_stored:
                parent = self.parents[block_hash]
                assert block_hash not in self.present
                assert parent is None or parent in self.present
                self.present.add(block_hash)
            else:
                self.present.remove(block_hash)
                assert not any(self.parents[other] == block_hash for other in self.present)


chains = st.lists(st.integers(0, 2), min_size=1, max_size=6)


class Sequences(RuleBasedStateMachine):
    """Owners of whole chains, as schedulers and leases are; the oracle knows the LRU order."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(14, BLOCK)
        self.replay = Replay()
        self.held: list[tuple[list[int], list[bytes]]] = []  # (table, hashes of its sealed blocks)
        self.last_use: dict[bytes, int] = {}
        self.now = 0
        self.generations = self.pool.generations.copy()

    def in_use(self) -> set[bytes]:
        return {block_hash for _, hashes in self.held for block_hash in hashes}

    def check_removed_are_lru_leaves(self) -> None:
        first, events = self.pool.drain_events()
        in_use, present = self.in_use(), set(self.replay.present)
        for is_stored, block_hash in events:
            if is_stored:
                present.add(block_hash)
                continue
            inner = {self.replay.parents[other] for other in present}
            leaves = present - inner - in_use
            assert block_hash in leaves
            assert self.last_use[block_hash] == min(self.last_use[leaf] for leaf in leaves)
            present.remove(block_hash)
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
        hashes = hashes_of(*chain)
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

    @rule(owner=consumes(tables))
    def finish(self, owner):
        self.held = [other for other in self.held if other is not owner]
        self.release(*owner)

    def release(self, table: list[int], hashes: list[bytes]) -> None:
        self.now += 1
        self.pool.release(table)
        for block_hash in set(hashes) - self.in_use():
            self.last_use[block_hash] = self.now

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
tails = st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK - 1)


class Blocks(RuleBasedStateMachine):
    """Owners of single blocks who seal and release in any order: nothing may leak or go missing."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, BLOCK)
        self.replay = Replay()
        self.held: list[int] = []
        self.kept: dict[int, tuple[bytes, list[int]]] = {}  # what was last kept in a block

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
        taken = self.pool.acquire_prefix(hashes_of(*chain))
        self.held += taken
        return multiple(*taken)

    @rule(block=consumes(blocks))
    def release(self, block):
        self.pool.release([block])
        self.held.remove(block)

    @rule(block=blocks, chain=short_chains)
    def seal(self, block, chain):
        hashes = hashes_of(*chain)
        self.replay.parents.update(zip(hashes, [None, *hashes]))
        if self.pool._hash_of[block] is None:
            self.pool.seal(block, hashes[-1], hashes[-2] if len(hashes) > 1 else None)

    @rule(block=blocks, chain=short_chains, tokens=tails)
    def keep_tail(self, block, chain, tokens):
        self.pool.keep_tail(block, hashes_of(*chain)[-1], tokens)
        if self.pool._hash_of[block] in self.pool._tails:
            self.kept[block] = (hashes_of(*chain)[-1], tokens)

    @rule(target=blocks, chain=short_chains, tokens=tails)
    def acquire_tail(self, chain, tokens):
        parent = hashes_of(*chain)[-1]
        before = self.pool.generations.copy()
        found = self.pool.acquire_tail(parent, tokens)
        if found is None:
            return multiple()
        block, count = found
        assert block not in self.held
        assert self.kept[block] == (parent, tokens[:count])
        assert list(np.flatnonzero(self.pool.generations != before)) == [block]
        self.held.append(block)
        return block

    @invariant()
    def all_is_accounted_for(self):
        self.pool.check_integrity([[block] for block in self.held])
        self.replay.apply(*self.pool.drain_events())
        assert set(stored(self.pool)) == self.replay.present
        assert self.pool.num_available == 10 - len(set(self.held))


TestSequences = Sequences.TestCase
TestSequences.settings = examples(300, stateful_step_count=40)
TestBlocks = Blocks.TestCase
TestBlocks.settings = examples(300, stateful_step_count=40)
