"""Which worker holds which prefix blocks: one bitmask of workers a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Block hash -> bitmask of worker slots. Who holds block i of a chain holds all before it, for
    workers evict leaves first: so the depth of a prefix on each is found by binary search."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._held: dict[int, set[bytes]] = {}  # slot -> its blocks, for dropping a slot at once

    def add(self, slot: int, block_hash: bytes) -> None:
        self._holders[block_hash] = self._holders.get(block_hash, 0) | (1 << slot)
        self._held.setdefault(slot, set()).add(block_hash)

    def remove(self, slot: int, block_hash: bytes) -> None:
        held = self._held.get(slot)
        if held is None or block_hash not in held:
            return
        held.discard(block_hash)
        self._forget(slot, block_hash)

    def drop(self, slot: int) -> None:
        """Forgets everything about a worker."""
        for block_hash in self._held.pop(slot, ()):
            self._forget(slot, block_hash)

    def replace(self, slot: int, block_hashes: Iterable[bytes]) -> None:
        """What a snapshot says is all that the worker holds."""
        self.drop(slot)
        for block_hash in block_hashes:
            self.add(slot, block_hash)

    def depths(self, block_hashes: Sequence[bytes]) -> dict[int, int]:
        """Slot -> how many leading blocks of the chain it holds; slots that hold none are absent.

        Workers are split by the middle block into those that hold it and those that do not, and so
        on: O(distinct depths x log blocks) look-ups, however many workers there are.
        """
        found: dict[int, int] = {}
        if not block_hashes:
            return found
        holders = self._holders
        first = holders.get(block_hashes[0], 0)
        # (low, high, mask): each worker of mask holds at least `low` blocks and at most `high`.
        work = [(1, len(block_hashes), first)] if first else []
        while work:
            low, high, mask = work.pop()
            while low < high:
                middle = (low + high + 1) // 2
                deep = holders.get(block_hashes[middle - 1], 0) & mask
                shallow = mask & ~deep
                if not deep:
                    high = middle - 1
                    continue
                if shallow:
                    work.append((low, middle - 1, shallow))
                low, mask = middle, deep
            while mask:
                lowest = mask & -mask
                found[lowest.bit_length() - 1] = low
                mask ^= lowest
        return found

    def _forget(self, slot: int, block_hash: bytes) -> None:
        mask = self._holders.get(block_hash, 0) & ~(1 << slot)
        if mask:
            self._holders[block_hash] = mask
        else:
            self._holders.pop(block_hash, None)
