"""Which worker holds which prefix blocks: one bitmask of workers a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

Level = tuple[int, int]  # workers as a bitmask of slots, and how many leading blocks they hold


class PrefixIndex:
    """Block hash -> bitmask of worker slots. Who holds block i of a chain holds all before it, for
    workers evict leaves first: so the depth of a prefix on each is found by binary search.

    Blocks that follow each other have the same holders as a rule: then their masks are one object.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        # Slot -> its blocks, for dropping a slot at once. Dicts, since the garbage collector does
        # not go through one that holds no containers, as it does through each set.
        self._held: dict[int, dict[bytes, None]] = {}
        self._alone: list[int] = []  # by slot, the mask of one that nobody else holds
        # The last mask that was changed, by which slot, and what it is since then.
        self._changed = (0, -1, 0)

    def __len__(self) -> int:
        """Blocks that anybody holds."""
        return len(self._holders)

    def held(self, slot: int) -> Set[bytes]:
        """The blocks of a worker."""
        return self._held.get(slot, {}).keys()

    def add(self, slot: int, block_hash: bytes) -> None:
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = {}
        elif block_hash in held:
            return
        held[block_hash] = None
        self._toggle(slot, block_hash)

    def remove(self, slot: int, block_hash: bytes) -> None:
        held = self._held.get(slot)
        if held is None or block_hash not in held:
            return
        del held[block_hash]
        self._toggle(slot, block_hash)

    def drop(self, slot: int) -> None:
        """Forgets everything about a worker."""
        for block_hash in self._held.pop(slot, ()):
            self._toggle(slot, block_hash)

    def replace(self, slot: int, block_hashes: Iterable[bytes]) -> None:
        """What a snapshot says is all that the worker holds."""
        names = set(block_hashes)
        for block_hash in self.held(slot) - names:
            self.remove(slot, block_hash)
        for block_hash in names:
            self.add(slot, block_hash)

    def depths(self, block_hashes: Sequence[bytes]) -> dict[int, int]:
        """Slot -> how many leading blocks of the chain it holds; who holds none is absent."""
        return depths(self.levels(block_hashes))

    def levels(self, block_hashes: Sequence[bytes]) -> list[Level]:
        """The same by depth, the deepest first: which workers hold so many leading blocks and no
        more.

        Workers are split by the middle block into those that hold it and those that do not, and so
        on: O(distinct depths x log blocks) look-ups, however many workers there are.
        """
        found: list[Level] = []
        if not block_hashes:
            return found
        holders_of = self._holders.get
        first = holders_of(block_hashes[0], 0)
        # (low, high, mask): each worker of mask holds at least `low` blocks and at most `high`.
        work = [(1, len(block_hashes), first)] if first else []
        while work:
            low, high, mask = work.pop()
            while low < high:
                middle = (low + high + 1) // 2
                deep = holders_of(block_hashes[middle - 1], 0) & mask
                if not deep:
                    high = middle - 1
                    continue
                if deep != mask:
                    work.append((low, middle - 1, mask & ~deep))
                low, mask = middle, deep
            found.append((mask, low))
        return found

    def _toggle(self, slot: int, block_hash: bytes) -> None:
        """The worker's bit of the block's mask changes."""
        mask = self._holders.get(block_hash, 0)
        before, by, after = self._changed
        if mask is not before or by != slot:
            after = mask ^ self._mask_of(slot) if mask else self._mask_of(slot)
            self._changed = (mask, slot, after)
        if after:
            self._holders[block_hash] = after
        else:
            del self._holders[block_hash]

    def _mask_of(self, slot: int) -> int:
        while len(self._alone) <= slot:
            self._alone.append(1 << len(self._alone))
        return self._alone[slot]


def depths(levels: Iterable[Level]) -> dict[int, int]:
    """The same by slot."""
    found: dict[int, int] = {}
    for mask, depth in levels:
        while mask:
            lowest = mask & -mask
            found[lowest.bit_length() - 1] = depth
            mask ^= lowest
    return found


def depth_at(levels: Iterable[Level], slot: int) -> int:
    """Of one worker."""
    return next((depth for mask, depth in levels if mask >> slot & 1), 0)
