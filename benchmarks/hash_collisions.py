"""Searches for two blocks of 16 tokens that share a hash.

python benchmarks/hash_collisions.py [--seconds 60]

Two searches over structured blocks: tokens 8 to 11 of a block vary, or 12 to 15, and in a way that
keeps the sum of their two 64-bit words.

differences   Where a word of the hash is, after a permutation that can be undone, the sum of a
              function of the first four and one of the other four (so it is in XXH3), a difference
              that occurs in both gives two blocks that collide in all 128 bits, under every parent.
              Each candidate is tried in full. BLAKE2b's last rounds cannot be undone, so the words
              of its digest are taken as they are.
birthday      Of all digests that were computed on the way: do two agree in all bits, and do as many
              agree in the first 40 as chance has it?

Both must find what there is to find: the first is run on XXH3-128, the block hash of old; the
second on the new hash cut to 40 bits. Neither proves that a hash is sound.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from crossdock.proto.hashing import BlockHasher

Hash = Callable[[bytes, bytes], bytes]  # of parent and packed token ids
Words = Callable[[np.ndarray], list[np.ndarray]]  # digests [n, 16] to uint64 [n] each

VOCABULARY = 49_152
LIST = 1 << 22  # blocks of each four that one round looks at
NEIGHBOURS = 4  # differences of each word to this many that follow it in order
SHORT_BITS = 40
PARENT = bytes(16)


@dataclass
class Found:
    """What a search of one hash came to."""

    hashed: int = 0
    candidates: int = 0
    collisions: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    short: int = 0  # pairs that agree in the first SHORT_BITS
    expected_short: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="on the new hash")
    parser.add_argument("--list", type=int, default=LIST, help="blocks in each list")
    options = parser.parse_args()
    cost()
    old = search("XXH3-128", xxh3, xxh3_words, 0.0, options.list)
    new = search("keyed BLAKE2b-128", keyed(), plain_words, options.seconds, options.list)
    control = bool(old.collisions) and new.short > 0
    print("the control finds collisions" if control else "THE CONTROL FINDS NOTHING: no result")
    print(f"keyed BLAKE2b-128: {len(new.collisions)} collisions")
    return 0 if control and not new.collisions else 1


def cost(tokens: int = 4096) -> None:
    """What a block of 16 costs in a prompt, its ids a list of Python's, as they arrive."""
    ids, hasher = list(range(tokens)), BlockHasher(secrets.token_bytes(32), 16)
    root = hasher.root(b"layout")

    def of_old() -> None:
        packed, parent = np.asarray(ids, dtype="<u4"), root
        for start in range(0, tokens, 16):
            parent = xxh3(parent, packed[start : start + 16].tobytes())

    runs = {"XXH3-128": of_old, "keyed BLAKE2b-128": lambda: hasher.chain(ids, root)}
    times = [[timeit.timeit(run, number=10) for run in runs.values()] for _ in range(30)]
    for name, best in zip(runs, np.min(times, axis=0), strict=True):
        print(f"{name}: {best / 10 / (tokens / 16) * 1e6:.2f} µs a block")


def search(name: str, block_hash: Hash, words: Words, seconds: float, size: int) -> Found:
    """Rounds over fresh blocks until `seconds` are over, one at least."""
    found, started, round_ = Found(), time.monotonic(), 0
    while not round_ or time.monotonic() - started < seconds:
        rng = np.random.default_rng(round_)
        lists = [traded(rng, size, at) for at in (8, 12)]
        digests = [hashed(block_hash, PARENT, blocks) for blocks in lists]
        found.hashed += 2 * size
        birthday(found, lists, digests)
        for first, second in zip(words(digests[0]), words(digests[1]), strict=True):
            differences(found, block_hash, lists, first, second)
        round_ += 1
    print(f"{name}: {found.hashed:,} blocks in {time.monotonic() - started:.0f} s; "
          f"{len(found.collisions)} collisions of 128 bits among {found.candidates} candidates; "
          f"{found.short} of {SHORT_BITS} bits, by chance {found.expected_short:.0f}",
          flush=True)  # fmt: skip
    for one, other in found.collisions[:3]:
        print(f"  {one.tolist()}\n  {other.tolist()}")
    return found


def traded(rng: np.random.Generator, size: int, at: int) -> np.ndarray:
    """Blocks [size, 16] of zeros but for tokens at to at + 3: what one gains, the next but one
    loses."""
    blocks = np.zeros((size, 16), dtype="<u4")
    gained = rng.integers(0, VOCABULARY, (size, 2), dtype=np.uint32)
    blocks[:, at : at + 2] = gained
    blocks[:, at + 2 : at + 4] = VOCABULARY - 1 - gained
    return blocks


def hashed(block_hash: Hash, parent: bytes, blocks: np.ndarray) -> np.ndarray:
    """Digests [n, 16] of blocks [n, 16]."""
    raw = blocks.tobytes()
    size = blocks.shape[1] * 4
    joined = b"".join([block_hash(parent, raw[i : i + size]) for i in range(0, len(raw), size)])
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


def birthday(found: Found, lists: list[np.ndarray], digests: list[np.ndarray]) -> None:
    """Pairs of unlike blocks among all of a round whose digests agree."""
    blocks, every = np.concatenate(lists), np.concatenate(digests)
    start = every[:, :8].copy().view(">u8").ravel().astype(np.uint64)
    order = np.argsort(start)
    near = (start[order][1:] ^ start[order][:-1]) >> np.uint64(64 - SHORT_BITS) == 0
    for place in np.flatnonzero(near):
        i, k = order[place], order[place + 1]
        if not np.array_equal(blocks[i], blocks[k]):
            found.short += 1
            if np.array_equal(every[i], every[k]):
                found.collisions.append((blocks[i], blocks[k]))
    found.expected_short += len(every) * (len(every) - 1) / 2 / 2**SHORT_BITS


def differences(
    found: Found, block_hash: Hash, lists: list[np.ndarray], first: np.ndarray, second: np.ndarray
) -> None:
    """first, second: a word of the hash of each block of the two lists."""
    sides = []
    for word in (first, second):
        order = np.argsort(word)
        ordered = word[order]
        near = [(ordered[by:] - ordered[:-by], by) for by in range(1, NEIGHBOURS + 1)]
        gaps = np.concatenate([gap for gap, _ in near])
        low = np.concatenate([order[: len(gap)] for gap, _ in near])
        high = np.concatenate([order[by:] for _, by in near])
        sides.append((gaps, low, high))
    (gaps_a, low_a, high_a), (gaps_b, low_b, high_b) = sides
    shared = np.intersect1d(gaps_a, gaps_b)
    shared = shared[shared > 0]  # zero: the same block twice
    for a in np.flatnonzero(np.isin(gaps_a, shared)):
        b = np.flatnonzero(gaps_b == gaps_a[a])[0]
        found.candidates += 1
        one = lists[0][high_a[a]] + lists[1][low_b[b]]
        other = lists[0][low_a[a]] + lists[1][high_b[b]]
        if all(
            block_hash(parent, one.tobytes()) == block_hash(parent, other.tobytes())
            for parent in (PARENT, b"another parent's")
        ):
            found.collisions.append((one, other))


def xxh3(parent: bytes, packed: bytes) -> bytes:
    return xxhash.xxh3_128_digest(parent + packed)


def xxh3_words(digests: np.ndarray) -> list[np.ndarray]:
    """The sum of XXH3's two accumulators: its lower half, the avalanche undone."""
    word = digests[:, 8:].copy().view(">u8").ravel().astype(np.uint64)
    word ^= word >> np.uint64(32)
    word *= np.uint64(pow(0x165667919E3779F9, -1, 2**64))
    word ^= word >> np.uint64(37)
    return [word]


def keyed() -> Hash:
    return BlockHasher(secrets.token_bytes(32), 16).block


def plain_words(digests: np.ndarray) -> list[np.ndarray]:
    """Both halves of the digest, as they are."""
    return [digests[:, at : at + 8].copy().view("<u8").ravel() for at in (0, 8)]


if __name__ == "__main__":
    sys.exit(main())
