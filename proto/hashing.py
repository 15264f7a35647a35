"""Names of full KV blocks: a chained xxh3-128 over parent name, token ids and cache salt.

Equal names mean equal token prefixes under equal salts, so KV computed for one serves the other.
Computed once, at the gateway, and carried with the request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

HASH_BYTES = 16


def root_hash(cache_salt: bytes = b"") -> bytes:
    """The parent of every first block under this salt."""
    return xxhash.xxh3_128_digest(b"crossdock.block.v1\0" + cache_salt)


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of the full block that holds `token_ids` after the prefix that `parent` names."""
    return xxhash.xxh3_128_digest(parent + np.asarray(token_ids, dtype="<u4").tobytes())


def chain_hashes(token_ids: Sequence[int], block_size: int, cache_salt: bytes = b"") -> list[bytes]:
    """Names of all full blocks of `token_ids`; the tail that fills no block has none."""
    ids = np.asarray(token_ids, dtype="<u4")
    parent = root_hash(cache_salt)
    names = []
    for start in range(0, len(ids) - block_size + 1, block_size):
        parent = xxhash.xxh3_128_digest(parent + ids[start : start + block_size].tobytes())
        names.append(parent)
    return names
