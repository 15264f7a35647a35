"""What a NIXL transport tells of its pool, and what it asks NIXL to register. Calls no nixl."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.regions import Ints, pack_regions, parse_regions
from crossdock.kvtransfer.transport import MemoryType, PoolMemory, Region
from crossdock.proto.errors import TransferFailed

# Version, incarnation, address of generations, blocks, type, device; then regions, metadata.
_INFO = struct.Struct("!B16sQQBI")
_INFO_VERSION = 2  # 2: regions in place of one address and block size
_MEMORY_TYPES: tuple[MemoryType, ...] = ("DRAM", "VRAM")


class PoolInfo(NamedTuple):
    """A registered pool: addresses in its owner's memory, and the metadata of its agent."""

    generations_ptr: int
    num_blocks: int
    memory_type: MemoryType
    device_id: int
    regions: tuple[Region, ...]
    metadata: bytes


def pack_info(memory: PoolMemory, incarnation: bytes, metadata: bytes) -> bytes:
    """For `parse_info` at the peer."""
    numbers = (memory.generations.ctypes.data, memory.num_blocks)
    where = (_MEMORY_TYPES.index(memory.memory_type), memory.device_id)
    head = _INFO.pack(_INFO_VERSION, incarnation, *numbers, *where)
    return head + pack_regions(memory.regions) + metadata


def parse_info(info: bytes, incarnation: bytes) -> PoolInfo:
    """What `incarnation` packed. Raises TransferFailed for anything else."""
    if len(info) <= _INFO.size or info[0] != _INFO_VERSION:
        raise TransferFailed("the peer's transport info is not NIXL's, or of another version")
    _, told, generations_ptr, num_blocks, kind, device_id = _INFO.unpack_from(info)
    if told != incarnation:
        raise TransferFailed(f"peer {incarnation.hex()} sent the transport info of {told.hex()}")
    if kind >= len(_MEMORY_TYPES):
        raise TransferFailed(f"the peer's transport info names memory type {kind}")
    where = (_MEMORY_TYPES[kind], device_id)
    return PoolInfo(generations_ptr, num_blocks, *where, *parse_regions(info[_INFO.size :]))


def stretches(memory: PoolMemory) -> list[tuple[int, int]]:
    """(address, bytes) of what holds all regions: those that interleave lie in one stretch, those
    that only touch may be allocations of their own."""
    found: list[tuple[int, int]] = []
    for region in sorted(memory.regions, key=lambda region: region.address):
        start, end = region.address, region.address + region.extent(memory.num_blocks)
        if found and start < sum(found[-1]):
            before, nbytes = found.pop()
            start, end = before, max(end, before + nbytes)
        found.append((start, end - start))
    return found


def descriptors(address: Ints, nbytes: Ints, device_id: int) -> npt.NDArray[np.uint64]:
    """uint64 [runs, 3]: address, bytes, device."""
    rows = np.empty((len(address), 3), dtype=np.uint64)
    rows[:, 0] = address
    rows[:, 1] = nbytes
    rows[:, 2] = device_id
    return rows
