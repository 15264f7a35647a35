"""Chains of block hashes, and a pool that holds them."""

from __future__ import annotations

from crossdock.kvcache.block_pool import BlockPool
from crossdock.proto.hashing import BlockHasher

BLOCK = 4
HASHER = BlockHasher(b"the key of these tests", BLOCK)


def hashes_of(*chain: int) -> list[bytes]:
    """Hashes of the blocks of a chain whose i-th block holds the token chain[i], repeated."""
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
    return [block_hash for _, block_hash in pool.snapshot()[1]]
