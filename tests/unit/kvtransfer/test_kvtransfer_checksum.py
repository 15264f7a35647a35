"""Checksums of blocks: XXH3's published values, every byte counted, VRAM through the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import fake_cupy
import numpy as np
import pytest
import xxhash

from crossdock.kvtransfer import checksum
from crossdock.kvtransfer.checksum import check_available, checksums
from crossdock.kvtransfer.registry import allocate
from crossdock.kvtransfer.transport import PoolMemory, Region
from crossdock.proto.errors import ConfigError

NUM_BLOCKS = 24
BLOCK_BYTES = 4096


@pytest.fixture(params=["block-major", "regions"])
def memory(request: pytest.FixtureRequest) -> Iterator[PoolMemory]:
    """Of one region, or of three, two of which interleave with room behind them."""
    buffer, generations, close = allocate("nixl", 2 * NUM_BLOCKS * BLOCK_BYTES, NUM_BLOCKS)
    buffer[:] = np.random.default_rng(0).integers(0, 256, len(buffer), dtype=np.uint8)
    start = buffer.ctypes.data
    regions: tuple[Region, ...] = (Region(start, BLOCK_BYTES, BLOCK_BYTES),)
    if request.param == "regions":
        behind = start + 1000 * NUM_BLOCKS
        regions = (
            Region(start, 1000, 1000),
            Region(behind, 3333, 96),
            Region(behind + 96, 3333, 3000),
        )
    yield PoolMemory(regions, NUM_BLOCKS, generations)
    del buffer, generations
    close()


def one_by_one(memory: PoolMemory, ids: list[int]) -> list[int]:
    views = memory.views
    sums = dict.fromkeys(ids, 0)
    for block_id in sums:
        for view in views:
            sums[block_id] = xxhash.xxh3_64_intdigest(view[block_id].tobytes(), sums[block_id])
    return [sums[block_id] for block_id in ids]


def test_they_are_xxh3_in_the_order_asked_for(memory: PoolMemory) -> None:
    assert checksums(memory, [7, 0, 23, 7]) == one_by_one(memory, [7, 0, 23, 7])
    assert checksums(memory, []) == []
    assert xxhash.xxh3_64_intdigest(b"") == 0x2D06800538D394C2  # published, with seed 0


def test_one_changed_bit_anywhere_is_seen(memory: PoolMemory) -> None:
    before = checksums(memory, range(NUM_BLOCKS))
    assert len(set(before)) == NUM_BLOCKS
    assert all(0 <= value < 1 << 64 for value in before)
    for part in memory.views:
        for byte in (0, 1, part.shape[1] // 2, part.shape[1] - 1):
            part[5, byte] ^= 1
            after = checksums(memory, range(NUM_BLOCKS))
            assert [i for i in range(NUM_BLOCKS) if after[i] != before[i]] == [5]
            part[5, byte] ^= 1


@pytest.mark.parametrize("wrong", [-1, NUM_BLOCKS])
def test_ids_outside_the_pool_are_refused(memory: PoolMemory, wrong: int) -> None:
    with pytest.raises(ValueError, match="block ids"):
        checksums(memory, [0, wrong])


@pytest.mark.parametrize("staged_blocks", [0.5, 1, 3, 100])
def test_vram_is_copied_in_pieces_that_fit(
    monkeypatch: pytest.MonkeyPatch, memory: PoolMemory, staged_blocks: float
) -> None:
    fake_cupy.install(monkeypatch)
    monkeypatch.setattr(checksum, "_STAGING_BYTES", int(staged_blocks * BLOCK_BYTES))
    vram = replace(memory, memory_type="VRAM", device_id=1)
    ids = [9, 3, 4, 5, 6, 7, 23, 0, 4]
    assert checksums(vram, ids) == one_by_one(memory, ids)
    assert checksums(vram, []) == []
    assert fake_cupy.Device.current == 0  # the caller's device is its own again


def test_vram_as_it_is(memory: PoolMemory) -> None:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed: no VRAM to sum")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    on_device = [cupy.asarray(part) for part in memory.views]
    regions = tuple(Region(part.data.ptr, part.shape[1], part.shape[1]) for part in on_device)
    vram = replace(memory, regions=regions, memory_type="VRAM")
    cupy.cuda.Device().synchronize()
    ids = [9, 3, 4, 5, 23, 0, 4]
    assert checksums(vram, ids) == one_by_one(memory, ids)


def test_without_cupy_a_gpu_pool_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    check_available("DRAM")
    with pytest.raises(ConfigError, match=r"kv\.verify: .*cupy.*pip install 'crossdock\[gpu\]'"):
        check_available("VRAM")
