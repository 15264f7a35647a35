"""What a KV pool looks like in memory, and whether two pools agree on it."""

from __future__ import annotations

import hashlib

from crossdock.proto.errors import LayoutMismatch
from crossdock.proto.v1.worker_pb2 import KVLayout

HASH_BYTES = 16


def layout_hash(layout: KVLayout) -> bytes:
    """16 bytes, equal exactly when every field of the layouts is equal."""
    digest = hashlib.blake2b(b"crossdock.layout\0", digest_size=HASH_BYTES)
    for name, value in _fields(layout):
        text = str(value).encode()
        digest.update(f"{name}={len(text)}:".encode() + text)
    return digest.digest()


def check_layouts(mine: KVLayout, theirs: KVLayout) -> None:
    """Raises LayoutMismatch that names every differing field with both its values."""
    differing = [
        f"{name} is {here!r} here and {there!r} there"
        for (name, here), (_, there) in zip(_fields(mine), _fields(theirs), strict=True)
        if here != there
    ]
    if differing:
        raise LayoutMismatch("KV layouts differ: " + "; ".join(differing))


def _fields(layout: KVLayout) -> list[tuple[str, object]]:
    return [(field.name, getattr(layout, field.name)) for field in KVLayout.DESCRIPTOR.fields]
