"""Where the blocks of a read lie: runs of them in each region of a pool, and their addresses."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.transport import Generations, Region
from crossdock.proto.errors import TransferFailed
from crossdock.proto.memory import region_sizes

Ints = npt.NDArray[np.int64]

_COUNT = struct.Struct("<H")
_REGION_BYTES = 24  # address, stride, bytes


@dataclass(frozen=True)
class Runs:
    """Blocks of a read, region by region, in runs that are one stretch of memory on both sides;
    in ascending remote order."""

    region: Ints  # [runs] its place among the pool's regions
    remote: Ints  # [runs] first block of each
    local: Ints  # [runs]
    length: Ints  # [runs] blocks
    blocks: int  # that are read, each in all regions

    def __len__(self) -> int:
        return len(self.length)


def merge_runs(
    remote_ids: Sequence[int],
    local_ids: Sequence[int] | Generations,
    packed: Sequence[bool] = (True,),
) -> Runs:
    """One run for each stretch of blocks that is consecutive remotely and locally, in each region;
    one for each block in regions that are not `packed` on both sides."""
    remote = np.asarray(remote_ids, dtype=np.int64)
    local = np.asarray(local_ids, dtype=np.int64)
    order = np.argsort(remote, kind="stable")
    remote, local = remote[order], local[order]
    begins = np.ones(len(remote), dtype=bool)  # whether each block is the first of a run
    begins[1:] = (remote[1:] - remote[:-1] != 1) | (local[1:] - local[:-1] != 1)
    starts = np.flatnonzero(begins)
    length = np.empty_like(starts)
    length[:-1], length[-1:] = starts[1:] - starts[:-1], len(remote) - starts[-1:]
    merged, single = (remote[starts], local[starts], length), (remote, local, np.ones_like(remote))
    columns = [merged if end_to_end else single for end_to_end in packed]
    region = np.repeat(np.arange(len(columns)), [len(length) for _, _, length in columns])
    first, second, length = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return Runs(region, first, second, length, len(remote))


class RegionTable:
    """The regions of a pool, to look up many blocks at once."""

    def __init__(self, regions: Sequence[Region]) -> None:
        table = np.array([(each.address, each.stride, each.nbytes) for each in regions], np.int64)
        self._address, self._stride, self._nbytes = table.T

    def spans(self, region: Ints, first: Ints, length: Ints) -> tuple[Ints, Ints]:
        """Address and bytes of each run: `length` blocks from `first` on, in that region."""
        return self._address[region] + first * self._stride[region], length * self._nbytes[region]


def match_regions(name: str, theirs: Sequence[Region], mine: Sequence[Region]) -> list[bool]:
    """For `merge_runs`: whether each region is packed there and here. Raises TransferFailed unless
    a block of peer `name` has as many bytes in each as one here; where they lie is each one's own.
    """
    if [region.nbytes for region in theirs] != [region.nbytes for region in mine]:
        raise TransferFailed(
            f"peer {name} has blocks of {region_sizes(theirs)} bytes, "
            f"here they have {region_sizes(mine)}"
        )
    return [there.packed and here.packed for there, here in zip(theirs, mine, strict=True)]


def pack_regions(regions: Sequence[Region]) -> bytes:
    """For `parse_regions`: how many, then address, stride and bytes of each, little-endian."""
    numbers = [(region.address, region.stride, region.nbytes) for region in regions]
    return _COUNT.pack(len(regions)) + np.array(numbers, dtype="<i8").tobytes()


def parse_regions(packed: bytes) -> tuple[tuple[Region, ...], bytes]:
    """What a peer packed, and the bytes behind it. Raises TransferFailed for anything else."""
    count = _COUNT.unpack_from(packed)[0] if len(packed) >= _COUNT.size else 0
    end = _COUNT.size + count * _REGION_BYTES
    if count == 0 or len(packed) < end:
        raise TransferFailed(f"the peer's transport info names {count} regions that it lacks")
    numbers = np.frombuffer(packed[_COUNT.size : end], dtype="<i8").reshape(-1, 3)
    try:
        return tuple(Region(*row) for row in numbers.tolist()), packed[end:]
    except ValueError as error:
        raise TransferFailed(f"the peer's transport info: {error}") from error
