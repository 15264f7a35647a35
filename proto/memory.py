"""The memory of a KV pool: an engine fills it, a transport reads it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Generations = npt.NDArray[np.int64]
MemoryType = Literal["DRAM", "VRAM"]


@dataclass(frozen=True)
class PoolMemory:
    """One worker's KV pool as a transport sees it. Owner of the memory: whoever allocated it.

    kv_ptr: address of block 0; block i lies at kv_ptr + i * block_bytes.
    generations: int64 [num_blocks] in host memory, raised before a block gets a new owner.
    A transport reads what is in memory, whatever stream still writes: the owner of VRAM waits for
    its kernels before it offers a block.
    """

    kv_ptr: int
    num_blocks: int
    block_bytes: int
    generations: Generations
    memory_type: MemoryType = "DRAM"
    device_id: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def blocks(self) -> npt.NDArray[np.uint8]:
        """uint8 [num_blocks, block_bytes] over the pool itself. Host memory only."""
        if self.memory_type != "DRAM":
            raise ValueError(f"a view of {self.memory_type} memory was asked for")
        raw = (ctypes.c_uint8 * self.kv_bytes).from_address(self.kv_ptr)
        pool: npt.NDArray[np.uint8] = np.ctypeslib.as_array(raw)
        return pool.reshape(self.num_blocks, self.block_bytes)
