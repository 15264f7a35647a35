"""Blocks in several regions: runs of them, their addresses, what peers tell each other of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_transport import FakeNetwork
from nccl_kit import Reader, Worker, settled
from transport_kit import BLOCK_BYTES, NUM_BLOCKS, Pool, content

from crossdock.kvtransfer.nccl import messages
from crossdock.kvtransfer.nccl.channel import Kind
from crossdock.kvtransfer.nixl_info import pack_info, parse_info, stretches
from crossdock.kvtransfer.regions import RegionTable, merge_runs, pack_regions, parse_regions
from crossdock.kvtransfer.transport import HandleState, PoolMemory, Region
from crossdock.proto.errors import TransferFailed
from crossdock.proto.memory import region_sizes

NO_COUNTERS = np.zeros(4, dtype=np.int64)


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((-8, 8, 8), "address -8 is below 0"),
        ((8, 8, 0), "nbytes 0 is below 1"),
        ((8, 7, 8), "stride 7 is below its 8 bytes"),
    ],
)
def test_what_is_no_region_is_refused(numbers: tuple[int, int, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Region(*numbers)
    packed = b"\1\0" + np.array(numbers, dtype="<i8").tobytes()
    with pytest.raises(TransferFailed, match=why):
        parse_regions(packed)


def test_a_block_is_the_parts_of_its_regions() -> None:
    buffer = np.arange(64, dtype=np.uint8)
    at = buffer.ctypes.data
    memory = PoolMemory((Region(at + 32, 8, 3), Region(at, 4, 4)), 4, NO_COUNTERS)
    assert memory.block_bytes == 7
    assert [view[2].tolist() for view in memory.views] == [[48, 49, 50], [8, 9, 10, 11]]
    memory.views[0][3] = 0
    assert buffer[56:60].tolist() == [0, 0, 0, 59]


def test_an_engines_tensors_are_a_pool_as_they_are() -> None:
    """As vLLM registers them: one tensor a layer, block first, each an allocation of its own."""
    torch = pytest.importorskip("torch")
    layers = [torch.full((4, 2, 16, 8), float(layer)) for layer in range(3)]
    regions = tuple(
        Region(each.data_ptr(), each.stride(0) * each.itemsize, each[0].nbytes) for each in layers
    )
    memory = PoolMemory(regions, 4, NO_COUNTERS)
    assert region_sizes(regions) == "3 x 1024"
    for layer, view in zip(layers, memory.views, strict=True):
        assert np.array_equal(view.view(np.float32), layer.reshape(4, -1).numpy())
    layers[1][2] = 7.0
    assert (memory.views[1][2].view(np.float32) == 7.0).all()


def test_runs_are_merged_in_regions_that_are_packed_on_both_sides() -> None:
    runs = merge_runs([5, 3, 4, 20], [15, 13, 14, 7], [True, False])
    rows = np.column_stack((runs.region, runs.remote, runs.local, runs.length)).tolist()
    assert rows == [
        *([0, 3, 13, 3], [0, 20, 7, 1]),
        *([1, 3, 13, 1], [1, 4, 14, 1], [1, 5, 15, 1], [1, 20, 7, 1]),
    ]
    assert runs.blocks == 4
    table = RegionTable([Region(1000, 10, 10), Region(5000, 100, 30)])
    address, nbytes = table.spans(runs.region, runs.remote, runs.length)
    assert address.tolist() == [1030, 1200, 5300, 5400, 5500, 7000]
    assert nbytes.tolist() == [30, 10, 30, 30, 30, 30]


def test_regions_that_interleave_are_registered_once() -> None:
    apart, touching = Region(0, 10, 10), Region(40, 10, 10)
    woven = (Region(200, 50, 20), Region(220, 50, 30))
    memory = PoolMemory((*woven, touching, apart), 4, NO_COUNTERS)
    # Those that only touch may be two allocations, which no library registers as one.
    assert stretches(memory) == [(0, 40), (40, 40), (200, 200)]


def test_sizes_are_told_as_groups() -> None:
    def told(*sizes: int) -> str:
        return region_sizes([Region(0, size, size) for size in sizes])

    assert told(98304) == "1 x 98304"
    assert told(64, 64, 8, 64) == "2 x 64 + 1 x 8 + 1 x 64"


def test_what_was_packed_is_parsed() -> None:
    regions = (Region(2**62, 2**40, 2**33), Region(0, 1, 1))
    assert parse_regions(pack_regions(regions) + b"metadata") == (regions, b"metadata")
    memory = PoolMemory(regions, 4, NO_COUNTERS, "VRAM", 3)
    told = parse_info(pack_info(memory, b"i" * 16, b"agent"), b"i" * 16)
    assert told == (NO_COUNTERS.ctypes.data, 4, "VRAM", 3, regions, b"agent")
    for short in (b"", b"\1", b"\0\0", pack_regions(regions)[:-1]):
        with pytest.raises(TransferFailed, match="transport info"):
            parse_regions(short)


def test_peers_of_unlike_regions_are_refused_with_both_named() -> None:
    network = FakeNetwork()
    made: list[Callable[[str], Pool]] = [
        lambda layout: Pool("fake", network, layout),
        lambda layout: Pool("local", layout=layout),
    ]
    for make in made:
        mine, theirs = make("block-major"), make("parts")
        info, why = theirs.transport.info(), r"blocks of 1 x 4096 \+ 1 x 6144 \+ 1 x 2048 bytes"
        with pytest.raises(TransferFailed, match=f"{why}, here they have 1 x 12288"):
            mine.transport.add_peer(theirs.incarnation, info, NUM_BLOCKS, BLOCK_BYTES)
        for pool in (mine, theirs):
            pool.close()


def test_an_owner_refuses_runs_of_blocks_that_do_not_lie_end_to_end() -> None:
    owner = Worker(layout="woven")
    wicked = Reader(owner)
    answer = wicked.ask(Kind.READ, np.array([(0, 3, 2), (1, 3, 2)], dtype="<i8").tobytes())
    assert answer.kind == Kind.REFUSED
    assert answer.body.decode() == "blocks of region 1 do not lie end to end"
    assert wicked.ask(Kind.FENCE, messages.pack_fence(b"", [3])).kind == Kind.GENERATIONS
    owner.pool.close()


@pytest.mark.parametrize(("mine", "theirs"), [("parts", "woven"), ("woven", "parts")])
def test_strides_are_each_pools_own(mine: str, theirs: str) -> None:
    """Over NCCL, whose owner computes its own addresses: both sides post the same pieces."""
    reader, owner = Worker(layout=mine), Worker(seed=3, layout=theirs)
    reader.meet(owner)
    reader.pool.clear()
    assert settled(reader.read(owner, [5, 6, 7], [1, 2, 3])) == [HandleState.DONE]
    assert np.array_equal(reader.pool.block(2), content(3, 6))
    assert reader.pool.written() == {1, 2, 3}
    for worker in (reader, owner):
        worker.pool.close()
