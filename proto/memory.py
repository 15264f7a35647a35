"""The memory of a KV pool: an engine fills it, a transport reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import numpy.typing as npt

Generations = npt.NDArray[np.int64]
MemoryType = Literal["DRAM", "VRAM"]


@dataclass(frozen=True)
class Region:
    """Where one part of every block lies: block i's is `nbytes` at address + i * stride.

    Raises ValueError for what is no region: bytes below 1, a stride below the bytes.
    """

    address: int
    stride: int  # bytes
    nbytes: int

    def __post_init__(self) -> None:
        if self.address < 0:
            raise ValueError(f"region: address {self.address} is below 0")
        if self.nbytes < 1:
            raise ValueError(f"region: nbytes {self.nbytes} is below 1")
        if self.stride < self.nbytes:
            raise ValueError(f"region: stride {self.stride} is below its {self.nbytes} bytes")

    @property
    def packed(self) -> bool:
        """Whether consecutive blocks lie end to end, so that one descriptor covers a run."""
        return self.stride == self.nbytes

    def extent(self, num_blocks: int) -> int:
        """Bytes from the address to the end of the last block."""
        return (num_blocks - 1) * self.stride + self.nbytes


@dataclass(frozen=True)
class PoolMemory:
    """One worker's KV pool as a transport sees it. Owner of the memory: whoever allocated it.

    regions: a block is their parts, in this order: one where blocks are contiguous, one a tensor
    where an engine keeps every layer by itself. They may interleave; all are on one device.
    ranks: how many processes hold a part of every block, each as these regions describe its own.
    generations: int64 [num_blocks] in host memory, raised before a block gets a new owner.
    A transport reads what is in memory, whatever stream still writes: the owner of VRAM waits for
    its kernels before it offers a block.
    """

    regions: tuple[Region, ...]
    num_blocks: int
    generations: Generations
    memory_type: MemoryType = "DRAM"
    device_id: int = 0
    ranks: int = 1

    @classmethod
    def block_major(
        cls,
        address: int,
        num_blocks: int,
        block_bytes: int,
        generations: Generations,
        memory_type: MemoryType = "DRAM",
        device_id: int = 0,
    ) -> PoolMemory:
        """Blocks of so many bytes, end to end from that address."""
        region = Region(address, block_bytes, block_bytes)
        return cls((region,), num_blocks, generations, memory_type, device_id)

    @cached_property
    def block_bytes(self) -> int:
        """Of one block, in all regions of all ranks."""
        return self.ranks * sum(region.nbytes for region in self.regions)

    @property
    def part(self) -> PoolMemory:
        """What this rank's transport reads and writes."""
        return replace(self, ranks=1)

    @cached_property
    def views(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """uint8 [num_blocks, nbytes] of each region, over the pool itself. Raises ValueError for
        memory that is not the host's."""
        if self.memory_type != "DRAM":
            raise ValueError(f"a view of {self.memory_type} memory was asked for")
        return tuple(self._view(region) for region in self.regions)

    def _view(self, region: Region) -> npt.NDArray[np.uint8]:
        raw = (ctypes.c_uint8 * region.extent(self.num_blocks)).from_address(region.address)
        return strided(np.ctypeslib.as_array(raw), 0, region, self.num_blocks)


def strided(
    memory: npt.NDArray[np.uint8], offset: int, region: Region, num_blocks: int
) -> npt.NDArray[np.uint8]:
    """uint8 [num_blocks, nbytes] over uint8 [bytes], whose byte `offset` is the region's first.
    Raises ValueError where that is too short."""
    shape, strides = (num_blocks, region.nbytes), (region.stride, 1)
    return np.ndarray(shape, np.uint8, memory, offset, strides)


def region_sizes(regions: Sequence[Region]) -> str:
    """Bytes of one block in each, which pools that exchange blocks have in common: "1 x 98304",
    "30 x 3072", "2 x 4096 + 1 x 512"."""
    alike = groupby(region.nbytes for region in regions)
    return " + ".join(f"{sum(1 for _ in group)} x {nbytes}" for nbytes, group in alike)
