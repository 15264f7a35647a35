"""Who owns each KV block, what it holds, and when it may be used again. Imports no torch.

    free ──allocate──> used (references > 0) ──release, cached──> evictable ──evicted──> free
      ^                  │        ^                                   │
      └─release, others──┘        └──────────acquire_prefix───────────┘

A full block is hashed (`seal`): the chained hash of its tokens and everything before them. Of the
blocks with one hash one is cached, a used one if there is any: when it is no longer used while
another used block has the same hash, that one is cached instead and the first becomes free.

Presence is monotone: a block is cached only while its parent is. So blocks are evicted leaves
first, the least recently used leaf first.

A block that a sequence left in part can be kept as the tail of its last full one (`keep_tail`), for
who goes on with the same tokens: a chat's next turn. It is a leaf like others, but nobody else's
business: no event tells of it, and who takes it is its next owner.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from crossdock.kvcache.free_runs import FreeRuns
from crossdock.proto.errors import Overloaded

BlockEvent = tuple[bool, bytes]  # (stored, else removed; block hash)


# Of a pool's blocks no more than 1/8 are kept as tails: short chats that nobody goes on with would
# push as many full blocks out as they have.
TAIL_SHARE = 8


class OutOfBlocks(Overloaded):
    """More blocks were asked for than are free or evictable. Nothing was taken."""


class IntegrityError(AssertionError):
    """A block is counted wrongly: a defect in the pool or in a caller."""


class BlockPool:
    """Owns the ids 0 … num_blocks - 1 of the KV pool. For one thread: the engine's.

    `generations` (int64 [num_blocks], may live in registered memory) counts the owners a block
    has had: it is raised before the block is given to a new one, so that a reader elsewhere can
    tell whether what it read was still what it was offered.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        generations: np.ndarray | None = None,
        prefix_cache: bool = True,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} must be >= 1")
        if generations is None:
            generations = np.zeros(num_blocks, dtype=np.int64)
        if generations.shape != (num_blocks,) or generations.dtype != np.int64:
            raise ValueError(
                f"generations is {generations.dtype} {generations.shape}, not int64 ({num_blocks},)"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.generations = generations
        self.prefix_cache = prefix_cache
        self._free = FreeRuns(num_blocks)
        self._references = [0] * num_blocks
        self._num_evictable = 0
        # By block hash. A used block may be hashed without being the one that is cached.
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}  # parents before children
        self._twins: dict[bytes, list[int]] = {}  # used blocks with the hash of a cached one
        self._parent: dict[bytes, bytes | None] = {}
        self._children: dict[bytes, set[bytes]] = {}  # only of hashes that have some
        self._tails: dict[bytes, tuple[int, ...]] = {}  # tokens, by what _tail_of has for a hash
        # Eviction order: (time of last use, id), with stale entries skipped when they come up.
        self._leaves: list[tuple[int, int]] = []
        self._last_use = [0] * num_blocks
        self._clock = 0
        # Undrained events; if nobody drains, the oldest go, which a reader sees as a gap.
        self._events: deque[BlockEvent] = deque(maxlen=4 * num_blocks + 1024)
        self._next_event = 0

    # -- counts --------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Cached blocks that nobody uses: hits for a later prefix, evicted when room is needed."""
        return self._num_evictable

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free) - self._num_evictable

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give."""
        return len(self._free) + self._num_evictable

    # -- prefix cache --------------------------------------------------------------------------

    def peek_prefix(self, hashes: Sequence[bytes]) -> int:
        """Number of leading blocks that `acquire_prefix` would find. Changes nothing."""
        # By bisection: no block is cached for longer than its parent.
        return bisect_left(hashes, True, key=lambda block_hash: block_hash not in self._cached)

    def fits(self, hashes: Sequence[bytes], num_blocks: int) -> bool:
        """Whether so many blocks, the cached prefix of `hashes` among them, can be had now.
        Changes nothing."""
        hits = [self._cached[block_hash] for block_hash in hashes[: self.peek_prefix(hashes)]]
        unused = sum(self._references[block] == 0 for block in hits)
        return num_blocks - len(hits) <= self.num_available - unused

    def acquire_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix; the caller gets one reference on each."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            if self._references[block] == 0:
                self._num_evictable -= 1
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def seal(self, block_id: int, block_hash: bytes, parent_hash: bytes | None) -> None:
        """Hashes a full block of the caller's. `parent_hash` is None for the first of a chain. The
        block is not cached while a used block with its hash is, and never when its parent is not
        cached."""
        if self._references[block_id] == 0:
            raise IntegrityError(f"block {block_id} is sealed but not in use")
        if not self.prefix_cache or self._hash_of[block_id] == block_hash:
            return
        if self._hash_of[block_id] is not None:
            raise IntegrityError(f"block {block_id} is sealed again under another hash")
        cached = self._cached.get(block_hash)
        if cached is None:
            if parent_hash is None or parent_hash in self._cached:
                self._hash_of[block_id] = block_hash
                self._store(block_hash, parent_hash, block_id)
        elif self._references[cached]:
            self._hash_of[block_id] = block_hash
            self._twins.setdefault(block_hash, []).append(block_id)
        else:
            self._num_evictable -= 1
            self._hash_of[block_id] = block_hash
            self._cache_instead(block_hash, cached, block_id)
            self._free.put((cached,))

    def keep_tail(self, block_id: int, parent: bytes, token_ids: Sequence[int]) -> None:
        """When the caller releases this block of its, which holds just these tokens after the block
        hashed `parent`, it stays for who goes on with them, in place of another tail there."""
        if not token_ids or parent not in self._cached or self._hash_of[block_id] is not None:
            return
        tail = _tail_of(parent)
        if tail in self._tails and not self._drop_tail(tail):
            return
        if len(self._tails) >= max(1, self.num_blocks // TAIL_SHARE):
            oldest = next(iter(self._tails))
            if not self._drop_tail(oldest):
                return
        self._tails[tail] = tuple(token_ids)
        self._hash_of[block_id] = tail
        self._store(tail, parent, block_id)

    def _drop_tail(self, tail: bytes) -> bool:
        """Frees the block of one; False where it is still its sequence's."""
        block = self._cached[tail]
        if self._references[block]:
            return False
        self._num_evictable -= 1
        self._uncache(tail)
        self._free.put((block,))
        return True

    def acquire_tail(self, parent: bytes, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """The block that was kept after the block hashed `parent`, if it holds the first of these
        tokens, and how many: the caller is its new owner, with one reference, and fills it on."""
        tail = _tail_of(parent)
        kept = self._tails.get(tail, ())
        block = self._cached.get(tail)
        if block is None or self._references[block] or tuple(token_ids[: len(kept)]) != kept:
            return None
        self._num_evictable -= 1
        self._uncache(tail)
        self.generations[block] += 1
        self._references[block] = 1
        return block, len(kept)

    # -- ownership -----------------------------------------------------------------------------

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """n empty blocks with one reference each, in as few runs of consecutive ids as possible.

        `after`: a block of the caller's that the first run should continue, if it can. Evicts
        evictable blocks when there are not enough free ones. Raises OutOfBlocks, nothing taken.
        """
        if n < 0:
            raise ValueError(f"n={n} must be >= 0")
        if n > self.num_available:
            raise OutOfBlocks(
                f"{n} KV blocks asked for, {self.num_free} free and {self.num_evictable} cached "
                f"of {self.num_blocks}"
            )
        if n > len(self._free):
            self._evict(n - len(self._free))
        blocks = self._free.take(n, after)
        for block in blocks:
            self.generations[block] += 1
            self._references[block] = 1
        return blocks

    def release(self, ids: Iterable[int]) -> None:
        """One reference less on each. At none a cached block becomes evictable, any other free."""
        self._clock += 1
        freed: list[int] = []
        for block in ids:
            references = self._references[block]
            if references == 0:
                raise IntegrityError(f"block {block} is released but not in use")
            self._references[block] = references - 1
            if references == 1 and not self._keep_cached(block):
                freed.append(block)
        self._free.put(freed)

    # -- events --------------------------------------------------------------------------------

    def drain_events(self) -> tuple[int, list[BlockEvent]]:
        """(number of the first event, events since the last call)."""
        events = list(self._events)
        self._events.clear()
        return self._next_event - len(events), events

    def snapshot(self) -> tuple[int, list[BlockEvent]]:
        """Every cached block as a stored event, parents first, numbered so that first + len(events)
        is the next event's number. Those not yet drained are part of it: drain before."""
        known = (block_hash for block_hash in self._cached if block_hash not in self._tails)
        events: list[BlockEvent] = [(True, block_hash) for block_hash in known]
        return self._next_event - len(events), events

    # -- block hashes --------------------------------------------------------------------------

    def _emit(self, stored: bool, block_hash: bytes) -> None:
        if block_hash in self._tails:
            return
        self._events.append((stored, block_hash))
        self._next_event += 1

    def _store(self, block_hash: bytes, parent: bytes | None, block: int) -> None:
        self._cached[block_hash] = block
        self._parent[block_hash] = parent
        if parent is not None:
            self._children.setdefault(parent, set()).add(block_hash)
        self._emit(True, block_hash)

    def _uncache(self, block_hash: bytes) -> None:
        """For a hash without children; makes its parent a leaf if it was the last child."""
        self._hash_of[self._cached.pop(block_hash)] = None
        for twin in self._twins.pop(block_hash, ()):
            self._hash_of[twin] = None
        parent = self._parent.pop(block_hash)
        if parent is not None:
            siblings = self._children[parent]
            siblings.remove(block_hash)
            if not siblings:
                del self._children[parent]
                block = self._cached[parent]
                if self._references[block] == 0:
                    self._push_leaf(block)
        self._emit(False, block_hash)
        self._tails.pop(block_hash, None)

    def _cache_instead(self, block_hash: bytes, old: int, new: int) -> None:
        self._hash_of[old] = None
        self._cached[block_hash] = new

    def _keep_cached(self, block: int) -> bool:
        """Called when the last reference goes. False: the block holds nothing worth keeping."""
        block_hash = self._hash_of[block]
        if block_hash is None:
            return False
        twins = self._twins.get(block_hash)
        if self._cached[block_hash] != block:
            assert twins is not None
            twins.remove(block)
            self._hash_of[block] = None
        elif twins:
            self._cache_instead(block_hash, block, twins.pop())
        else:
            self._num_evictable += 1
            self._last_use[block] = self._clock
            if block_hash not in self._children:
                self._push_leaf(block)
            return True
        if not twins:
            del self._twins[block_hash]
        return False

    # -- eviction ------------------------------------------------------------------------------

    def _push_leaf(self, block: int) -> None:
        if len(self._leaves) > 2 * self._num_evictable + 64:
            self._leaves = sorted({leaf for leaf in self._leaves if self._is_leaf(*leaf)})
        heapq.heappush(self._leaves, (self._last_use[block], block))

    def _is_leaf(self, last_use: int, block: int) -> bool:
        """Whether this entry of `_leaves` still says what is so."""
        return (
            self._references[block] == 0
            and self._last_use[block] == last_use
            and (block_hash := self._hash_of[block]) is not None
            and block_hash not in self._children
        )

    def _evict(self, n: int) -> None:
        evicted: list[int] = []
        while len(evicted) < n:
            if not self._leaves:
                self._uncache_used_descendants()
            last_use, block = heapq.heappop(self._leaves)
            if self._is_leaf(last_use, block):
                block_hash = self._hash_of[block]
                assert block_hash is not None
                self._num_evictable -= 1
                evicted.append(block)
                self._uncache(block_hash)
        self._free.put(evicted)

    def _uncache_used_descendants(self) -> None:
        """Makes a leaf where every evictable block has a used descendant: only for callers that
        keep the tail of a chain and release its head, so it may walk all that is cached."""
        head = next(key for key, block in self._cached.items() if self._references[block] == 0)
        below = [head]
        for block_hash in below:
            below.extend(self._children.get(block_hash, ()))
        for block_hash in reversed(below[1:]):
            if self._references[self._cached[block_hash]]:
                self._uncache(block_hash)
            if self._leaves:
                break

    # -- checks --------------------------------------------------------------------------------

    def check_integrity(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raises IntegrityError unless every block is free, evictable, or referenced as `held`
        says: the block tables of all owners, one reference a mention."""
        expected = [0] * self.num_blocks
        for table in held:
            for block in table:
                expected[block] += 1
        self._check_blocks(expected)
        self._check_hashes()

    def _check_blocks(self, expected: list[int]) -> None:
        free = [id_ for first, n in self._free.runs() for id_ in range(first, first + n)]
        _check(len(set(free)) == len(free) == len(self._free), "free runs overlap")
        free_ids = set(free)
        leaves = set(self._leaves)
        evictable = 0
        for block, references in enumerate(self._references):
            known = self._hash_of[block]
            if references != expected[block]:
                raise IntegrityError(
                    f"block {block} has {references} references, its owners hold {expected[block]}"
                )
            if block in free_ids:
                if references or known is not None:
                    raise IntegrityError(f"block {block} is free but in use")
            elif not references:
                evictable += 1
                if known is None or self._cached.get(known) != block:
                    raise IntegrityError(f"block {block} is leaked: neither free, cached nor used")
                if known not in self._children and (self._last_use[block], block) not in leaves:
                    raise IntegrityError(f"leaf {block} is stuck")
        counted = self._num_evictable
        _check(evictable == counted, f"{evictable} evictable blocks, {counted} counted")

    def _check_hashes(self) -> None:
        for block_hash, block in self._cached.items():
            if self._hash_of[block] != block_hash:
                raise IntegrityError(f"block {block} does not know the hash it is cached under")
            parent = self._parent[block_hash]
            if parent is not None and parent not in self._cached:
                raise IntegrityError(f"block {block} outlived its parent")
            if parent is not None and block_hash not in self._children[parent]:
                raise IntegrityError(f"child {block} is lost")
        children = sum(len(below) for below in self._children.values())
        parents = sum(parent is not None for parent in self._parent.values())
        _check(children == parents, f"{children} children, {parents} parents")
        for block, known in enumerate(self._hash_of):
            if known is not None and self._cached.get(known) != block:
                _check(block in self._twins.get(known, ()), f"block {block} has a lost hash")
        _check(self._tails.keys() <= self._cached.keys(), "a tail is lost")
        twins = [(key, block) for key, blocks in self._twins.items() for block in blocks]
        for key, block in twins:
            _check(self._hash_of[block] == key, f"block {block} is a twin of nothing")
            cached = self._cached[key]
            _check(self._references[cached] > 0, f"unused cached block beside {block}")


def _tail_of(block_hash: bytes) -> bytes:
    """What a tail after this block is cached under: no block's hash."""
    return block_hash + b"tail"


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise IntegrityError(message)
