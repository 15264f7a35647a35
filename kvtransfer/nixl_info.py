"""What a NIXL transport tells of its pool, and where blocks lie in one. Calls no nixl."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.transport import MemoryType, PoolMemory
from crossdock.proto.errors import TransferFailed

# Version, incarnation, address of KV and of generations, blocks, block bytes, type, device.
_INFO = struct.Struct("!B16sQQQQBI")
_INFO_VERSION = 1
_MEMORY_TYPES: tuple[MemoryType, ...] = ("DRAM", "VRAM")


class PoolInfo(NamedTuple):
    """A registered pool: addresses in its owner's memory, and the metadata of its agent."""

    kv_ptr: int
    generations_ptr: int
    num_blocks: int
    block_bytes: int
    memory_type: MemoryType
    device_id: int
    metadata: bytes


def pack_info(memory: PoolMemory, incarnation: bytes, metadata: bytes) -> bytes:
    """For `parse_info` at the peer."""
    numbers = (memory.generations.ctypes.data, memory.num_blocks, memory.block_bytes)
    where = (_MEMORY_TYPES.index(memory.memory_type), memory.device_id)
    return _INFO.pack(_INFO_VERSION, incarnation, memory.kv_ptr, *numbers, *where) + metadata


def parse_info(info: bytes, incarnation: bytes) -> PoolInfo:
    """What `incarnation` packed. Raises TransferFailed for anything else."""
    if len(info) <= _INFO.size or info[0] != _INFO_VERSION:
        raise TransferFailed("the peer's transport info is not NIXL's, or of another version")
    _, told, *numbers, kind, device_id = _INFO.unpack_from(info)
    if told != incarnation:
        raise TransferFailed(f"peer {incarnation.hex()} sent the transport info of {told.hex()}")
    if kind >= len(_MEMORY_TYPES):
        raise TransferFailed(f"the peer's transport info names memory type {kind}")
    return PoolInfo._make([*numbers, _MEMORY_TYPES[kind], device_id, info[_INFO.size :]])


def descriptors(
    base: int,
    first: npt.NDArray[np.int64],
    length: npt.NDArray[np.int64],
    size: int,
    device_id: int,
) -> npt.NDArray[np.uint64]:
    """uint64 [runs, 3]: address, bytes, device."""
    rows = np.empty((len(first), 3), dtype=np.uint64)
    rows[:, 0] = base + first * size
    rows[:, 1] = length * size
    rows[:, 2] = device_id
    return rows
