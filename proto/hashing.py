"""Hashes of full KV blocks: a chain of keyed BLAKE2b-128 over parent hash and token ids.

Equal hashes mean equal token prefixes under equal roots, so KV computed for one serves the other.
A root covers what else KV depends on, and who may share it: model and layout of the pool, cache
salt. Nobody without the cluster's key can compute a hash, let alone search for two prompts that
share one. Computed once, at the gateway, and carried with the request; a worker goes on with the
chain for the tokens that it generates.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HASH_BYTES = 16


def hash_key(cluster_key: bytes) -> bytes:
    """The key of a cluster's hashes, 32 bytes. It signs no tickets."""
    return hmac.digest(cluster_key, b"crossdock.block.v2", "sha256")


@dataclass(frozen=True)
class BlockHasher:
    """Hashes blocks of `block_size` tokens. Raises ValueError unless `key` has 16 to 64 bytes."""

    key: bytes = field(repr=False)
    block_size: int
    _keyed: Any = field(init=False, repr=False, compare=False)  # copied for each hash

    def __post_init__(self) -> None:
        if len(self.key) < 16:
            raise ValueError(f"key: {len(self.key)} bytes; at least 16")
        keyed = hashlib.blake2b(key=self.key, digest_size=HASH_BYTES)
        object.__setattr__(self, "_keyed", keyed)

    def root(self, identity: bytes, cache_salt: bytes = b"") -> bytes:
        """The parent of every first block. identity: of model and layout, the layout hash."""
        return self._hash(b"root" + len(identity).to_bytes(4, "little") + identity + cache_salt)

    def block(self, parent: bytes, packed: bytes) -> bytes:
        """Hash of the block whose ids are `packed` (little-endian, 4 bytes each)."""
        return self._hash(b"block" + parent + packed)

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], root: bytes) -> None:
        """Appends the hashes of those full blocks of `token_ids` that `hashes` lacks."""
        start, size = len(hashes) * self.block_size, 4 * self.block_size
        if len(token_ids) - start < self.block_size:
            return
        packed, parent = _packed(token_ids[start:]), hashes[-1] if hashes else root
        for at in range(0, len(packed) - size + 1, size):
            parent = self.block(parent, packed[at : at + size])
            hashes.append(parent)

    def chain(self, token_ids: Sequence[int], root: bytes) -> list[bytes]:
        """The hashes of all full blocks of `token_ids`."""
        hashes: list[bytes] = []
        self.extend(hashes, token_ids, root)
        return hashes

    def prompt(self, token_ids: Sequence[int], hashes: Sequence[bytes], root: bytes) -> bytes:
        """What binds a ticket to its prompt: all of its tokens, and the last of the hashes that its
        full blocks are cached under. `hashes` may end before `token_ids` do, or go on beyond."""
        chain = list(hashes[: len(token_ids) // self.block_size])
        self.extend(chain, token_ids, root)
        return self._hash(b"prompt" + (chain[-1] if chain else root) + _packed(token_ids))

    def _hash(self, message: bytes) -> bytes:
        state = self._keyed.copy()
        state.update(message)
        return bytes(state.digest())


def _packed(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)
