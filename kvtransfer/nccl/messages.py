"""What is inside the nccl transport's messages, and what of it is believed.

All integers little-endian. A parser raises ValueError for what the pool does not have, so that one
request is refused; TransferFailed where the peer is not what it should be.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.regions import Runs, pack_regions, parse_regions
from crossdock.kvtransfer.transport import Generations, PoolMemory, Region, check_ids
from crossdock.proto.errors import TransferFailed

Address = tuple[socket.AddressFamily, Any]  # the second as sockets of that family take it

# Version, incarnation, blocks, port; then regions and the host.
_INFO = struct.Struct("<B16sQH")
_INFO_VERSION = 2  # 2: regions in place of one block size
_MAX_NOTIFICATION = 255


def pack_info(incarnation: bytes, memory: PoolMemory, host: str, port: int) -> bytes:
    """What a peer's `parse_info` reads: version, incarnation, pool, and where to connect."""
    head = _INFO.pack(_INFO_VERSION, incarnation, memory.num_blocks, port)
    return head + pack_regions(memory.regions) + host.encode()


def parse_info(info: bytes, incarnation: bytes) -> tuple[Address, int, tuple[Region, ...]]:
    """Where the peer listens; its number of blocks and its regions. May ask a name server."""
    if len(info) <= _INFO.size or info[0] != _INFO_VERSION:
        raise TransferFailed("the peer's transport info is not NCCL's, or of another version")
    _, told, num_blocks, port = _INFO.unpack_from(info)
    if told != incarnation:
        raise TransferFailed(f"peer {incarnation.hex()} sent the transport info of {told.hex()}")
    regions, host = parse_regions(info[_INFO.size :])
    return resolve(host.decode(errors="replace"), port), num_blocks, regions


def resolve(host: str, port: int) -> Address:
    """Socket family and address, the first that fits. Raises TransferFailed."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise TransferFailed(f"no address for {host!r}: {error}") from error
    return family, address


def pack_read(runs: Runs) -> bytes:
    """int64 [runs, 3]: region, first remote block and number of blocks of each run."""
    return np.column_stack((runs.region, runs.remote, runs.length)).astype("<i8").tobytes()


def parse_read(body: bytes, num_blocks: int, regions: Sequence[Region]) -> npt.NDArray[np.int64]:
    """int64 [3, runs]: region, first block and blocks of each, all of them inside the pool, and
    each of them one stretch of memory."""
    if len(body) % 24:
        raise ValueError(f"a read of {len(body)} bytes")
    runs = np.frombuffer(body, dtype="<i8").reshape(-1, 3).astype(np.int64)
    most = num_blocks * len(regions)
    if len(runs) > most:
        raise ValueError(f"a read of {len(runs)} runs, the pool has {most} parts of blocks")
    region, first, count = runs.T
    strange = (region < 0) | (region >= len(regions))
    if strange.any():
        raise ValueError(f"region {region[np.argmax(strange)]}, the pool has {len(regions)}")
    # Each bound by itself: a sum could leave 64 bits.
    outside = (first < 0) | (count < 1) | (count > num_blocks) | (first > num_blocks - count)
    if outside.any():
        _, begin, length = runs[np.argmax(outside)].tolist()
        raise ValueError(f"{length} blocks from {begin}, the pool has {num_blocks}")
    apart = np.array([not each.packed for each in regions])[region] & (count > 1)
    if apart.any():
        raise ValueError(f"blocks of region {region[np.argmax(apart)]} do not lie end to end")
    return runs.T


def pack_fence(notify: bytes, ids: Sequence[int]) -> bytes:
    """Length of `notify` (at most 255, else ValueError), `notify`, int64 [blocks] ids."""
    if len(notify) > _MAX_NOTIFICATION:
        raise ValueError(f"a notification of {len(notify)} bytes")
    return bytes([len(notify)]) + notify + np.asarray(ids, dtype="<i8").tobytes()


def parse_fence(body: bytes, num_blocks: int) -> tuple[bytes, npt.NDArray[np.int64]]:
    """The notification, and the ids, all of them inside the pool."""
    end = 1 + body[0] if body else 0
    if not body or len(body) < end or (len(body) - end) % 8:
        raise ValueError(f"a fence of {len(body)} bytes")
    ids = np.frombuffer(body, dtype="<i8", offset=end).astype(np.int64)
    check_ids(ids, num_blocks, "fenced")
    return body[1:end], ids


def pack_generations(generations: Generations) -> bytes:
    """int64 [blocks], little-endian."""
    return generations.astype("<i8").tobytes()


def parse_generations(body: bytes) -> Generations:
    """int64 [blocks]. Raises TransferFailed for a body of no whole number of them."""
    if len(body) % 8:
        raise TransferFailed(f"generations of {len(body)} bytes")
    return np.frombuffer(body, dtype="<i8").astype(np.int64)
