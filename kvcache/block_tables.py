"""How a sequence takes, fills, hashes and gives back blocks of a pool. Imports no torch.

A sequence owns one reference on each block of its table, from `attach_prefix` or `grow` until
`release` (or until its owner hands the references on, as prefill does with an offered ticket).
"""

from __future__ import annotations

from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Sequence

LEAST_TAIL = 4  # tokens: fewer would let who shares a cache guess another's text token by token


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`, the last one maybe in part."""
    return -(-num_tokens // block_size)


def uncached(pool: BlockPool, sequence: Sequence) -> int:
    """Tokens that a waiting sequence would have to compute now."""
    reusable = sequence.block_hashes[: sequence.reusable // pool.block_size]
    return sequence.num_tokens - pool.peek_prefix(reusable) * pool.block_size


def take(
    pool: BlockPool,
    sequence: Sequence,
    max_cached: int,
    *,
    spare: int = 0,
    lookahead: int = 0,
    tail: bool = False,
) -> bool:
    """Gives a sequence blocks for all its tokens and `lookahead` more, up to `max_cached` tokens
    from the prefix cache; with a `tail` of them, for who computes what follows. False, and takes
    nothing, unless `spare` blocks stay available."""
    num_tokens = sequence.num_tokens + lookahead
    needed = min(blocks_for(num_tokens, pool.block_size), pool.num_blocks)
    if not pool.fits(sequence.block_hashes[: max_cached // pool.block_size], needed + spare):
        return False
    attach_prefix(pool, sequence, max_cached)
    if tail:
        attach_tail(pool, sequence, max_cached)
    grow(pool, sequence, num_tokens)
    return True


def attach_prefix(pool: BlockPool, sequence: Sequence, max_tokens: int) -> None:
    """Takes the cached blocks that hold the sequence's first tokens, up to `max_tokens`."""
    hits = pool.acquire_prefix(sequence.block_hashes[: max_tokens // pool.block_size])
    sequence.block_table = hits
    sequence.num_sealed = len(hits)
    sequence.num_computed = sequence.num_cached = len(hits) * pool.block_size


def attach_tail(pool: BlockPool, sequence: Sequence, max_tokens: int) -> None:
    """Takes, after its cached blocks, the part of a block that was kept after them, where that
    holds the sequence's next tokens, up to `max_tokens` in all."""
    full = sequence.num_sealed
    cached = full * pool.block_size
    if full:
        rest = sequence.token_ids[cached : min(max_tokens, cached + pool.block_size)]
        if found := pool.acquire_tail(sequence.block_hashes[full - 1], rest):
            block, tokens = found
            sequence.block_table.append(block)
            sequence.num_computed = sequence.num_cached = cached + tokens


def keep_tail(pool: BlockPool, sequence: Sequence) -> None:
    """Of a sequence that is about to be released: the tokens after its last full block are kept for
    who goes on with them."""
    full = sequence.num_sealed
    tokens = sequence.token_ids[full * pool.block_size : sequence.num_computed]
    if full and len(tokens) >= LEAST_TAIL:
        pool.keep_tail(sequence.block_table[full], sequence.block_hashes[full - 1], tokens)


def grow(pool: BlockPool, sequence: Sequence, num_tokens: int) -> None:
    """Extends the table to hold `num_tokens`, or all that the pool holds where that is less.
    Raises OutOfBlocks and takes nothing."""
    wanted = min(blocks_for(num_tokens, pool.block_size), pool.num_blocks)
    missing = wanted - len(sequence.block_table)
    if missing > 0:
        last = sequence.block_table[-1] if sequence.block_table else None
        sequence.block_table.extend(pool.allocate(missing, after=last))


def seal_full(pool: BlockPool, sequence: Sequence) -> None:
    """Hashes the blocks that have become full, so that others find them."""
    size, hashes = pool.block_size, sequence.block_hashes
    for index in range(sequence.num_sealed, sequence.num_computed // size):
        parent = hashes[index - 1] if index else None
        pool.seal(sequence.block_table[index], hashes[index], parent)
        sequence.num_sealed = index + 1


def release(pool: BlockPool, sequence: Sequence) -> None:
    """Gives every block back; hashed ones stay cached until they are evicted."""
    pool.release(sequence.block_table)
    sequence.block_table = []
    sequence.num_computed = sequence.num_cached = sequence.num_sealed = 0
