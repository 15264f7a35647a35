"""What a block's bytes are, in eight of them: XXH3 with 64 bits, for whoever wants a second proof.

The fence proves that a block had one owner while it was read; a checksum proves that the bytes
arrived. It finds accidents, not attackers: anyone can compute another block of the same sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from crossdock.kvtransfer.regions import merge_runs
from crossdock.kvtransfer.transport import PoolMemory, check_ids
from crossdock.proto.errors import ConfigError

_STAGING_BYTES = 32 << 20  # of pinned host memory that VRAM is copied through, while it is summed


def check_available(memory_type: str) -> None:
    """Raises ConfigError where blocks of "DRAM" or "VRAM" cannot be summed in this process."""
    try:
        if memory_type == "VRAM":
            import cupy  # noqa: F401
    except ImportError as error:
        message = f"'checksum' on a GPU needs cupy: pip install 'crossdock[gpu]' ({error})"
        raise ConfigError("kv.verify", message) from error


def checksums(memory: PoolMemory, block_ids: Sequence[int]) -> list[int]:
    """The unsigned 64-bit XXH3 of each block's bytes, in the order of the ids: those of each region
    with the sum of the regions before it for a seed. Like a transport it reads what is in memory,
    so whoever owns the blocks has waited for its kernels. Raises ValueError for ids that the pool
    does not have."""
    check_ids(block_ids, memory.num_blocks, "checksummed")
    if memory.memory_type == "DRAM":
        views = memory.views
        return [_sum(view[block_id] for view in views) for block_id in block_ids]
    sums: dict[int, int] = {}
    for first, parts in _copied(memory, block_ids):
        sums.update((first + row, _sum(block)) for row, block in enumerate(zip(*parts)))
    return [sums[block_id] for block_id in block_ids]


def _sum(parts: Iterable[npt.NDArray[np.uint8]]) -> int:
    total = 0
    for part in parts:
        total = xxh3_64_intdigest(part.data, total)
    return total


def _copied(
    memory: PoolMemory, block_ids: Sequence[int]
) -> Iterator[tuple[int, list[npt.NDArray[np.uint8]]]]:
    """(first block id, uint8 [blocks, nbytes] of each region) of some blocks at a time, copied from
    VRAM to the host on a stream of its own; valid until the next ones."""
    import cupy

    size = memory.block_bytes
    most = max(1, _STAGING_BYTES // size)
    unique = sorted(set(block_ids))
    with cupy.cuda.Device(memory.device_id):
        stream = cupy.cuda.Stream(non_blocking=True)
        staging = cupy.cuda.alloc_pinned_memory(min(most, len(unique) or 1) * size)
        host = np.frombuffer(staging, dtype=np.uint8)
        runs = merge_runs(unique, unique)
        for run, length in zip(runs.remote.tolist(), runs.length.tolist(), strict=True):
            for first in range(run, run + length, most):
                count = min(most, run + length - first)
                parts, staged = [], 0
                for region in memory.regions:
                    cupy.cuda.runtime.memcpy2DAsync(
                        staging.ptr + staged,
                        region.nbytes,
                        region.address + first * region.stride,
                        region.stride,
                        region.nbytes,
                        count,
                        cupy.cuda.runtime.memcpyDeviceToHost,
                        stream.ptr,
                    )
                    nbytes = count * region.nbytes
                    parts.append(host[staged : staged + nbytes].reshape(count, region.nbytes))
                    staged += nbytes
                stream.synchronize()
                yield first, parts
