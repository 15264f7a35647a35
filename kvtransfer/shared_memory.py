"""KV pools in shared memory: each one file under /dev/shm, that other processes can map.

Its owner holds a lock on it for life, so a file that can be locked by another belongs to nobody
and is removed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.transport import Generations, PoolBuffers, PoolMemory, Region
from crossdock.proto.errors import TransferFailed
from crossdock.proto.memory import strided

_SHM = Path("/dev/shm")
NAME = re.compile(r"crossdock-\d+-[0-9a-f]{32}")


@dataclass(frozen=True)
class Segment:
    """A pool of this process. The file holds the generations, then, on a page of its own, KV."""

    name: str
    fd: int
    kv_offset: int
    kv_bytes: int

    def remove(self) -> None:
        """For its owner; those who have it mapped keep it."""
        with contextlib.suppress(OSError):
            (_SHM / self.name).unlink()
        with contextlib.suppress(OSError):
            os.close(self.fd)


_segments: dict[int, Segment] = {}  # by the address of their first block


def allocate_segment(nbytes: int, num_blocks: int) -> PoolBuffers:
    """See registry.allocate. Raises TransferFailed when /dev/shm has no room."""
    cleanup_stale()
    kv_offset = -(-num_blocks * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    segment = _create_file(kv_offset, max(nbytes, 1))
    pages = mmap.mmap(segment.fd, kv_offset + segment.kv_bytes)
    generations = np.frombuffer(pages, dtype=np.int64, count=num_blocks)
    buffer = np.frombuffer(pages, dtype=np.uint8, count=nbytes, offset=kv_offset)
    address = buffer.ctypes.data
    _segments[address] = segment

    def close() -> None:
        if _segments.pop(address, None) is not None:
            segment.remove()
            # A view that somebody still has keeps the pages mapped until it goes.
            with contextlib.suppress(BufferError):
                pages.close()

    return buffer, generations, close


def file_of(memory: PoolMemory) -> tuple[str, tuple[Region, ...]] | None:
    """The segment of this process that holds all regions of a pool, and they with offsets in its
    file for addresses. None: there is none."""
    regions = memory.regions
    start = min(region.address for region in regions)
    end = max(region.address + region.extent(memory.num_blocks) for region in regions)
    for base, segment in list(_segments.items()):
        if base <= start and end <= base + segment.kv_bytes:
            shift = segment.kv_offset - base
            moved = (replace(region, address=region.address + shift) for region in regions)
            return segment.name, tuple(moved)
    return None


def cleanup_stale() -> list[str]:
    """Removes the pools of processes that are gone, and names them."""
    removed = []
    for path in _SHM.glob("crossdock-*"):
        if not NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            fd = _open_own(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(fd)
    return removed


def _open_own(path: Path) -> int:
    """For reading. Raises OSError for what is no plain file of this user: under /dev/shm anybody
    may put something, as a pipe that opening waits for, or a link to elsewhere."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, "not a pool of this user")
    return fd


def _create_file(kv_offset: int, kv_bytes: int) -> Segment:
    """A file that is locked before it is linked anywhere, so that no janitor finds it unlocked."""
    fd = os.open(_SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    name, nbytes = f"crossdock-{os.getpid()}-{secrets.token_hex(16)}", kv_offset + kv_bytes
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.posix_fallocate(fd, 0, nbytes)  # a full /dev/shm is an error here, not a SIGBUS later
        _link(fd, _SHM / name)
    except OSError as error:
        os.close(fd)
        raise TransferFailed(
            f"no shared memory for a KV pool of {nbytes} bytes under {_SHM}: {error.strerror}"
        ) from error
    return Segment(name, fd, kv_offset, kv_bytes)


def _link(fd: int, path: Path) -> None:
    """Gives an O_TMPFILE file its name. Without the folder, os.link would not follow."""
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _remove_own() -> None:
    for segment in list(_segments.values()):
        if segment.name.startswith(f"crossdock-{os.getpid()}-"):
            segment.remove()


atexit.register(_remove_own)


def map_pool(
    name: str, num_blocks: int, regions: Sequence[Region]
) -> tuple[Generations, tuple[npt.NDArray[np.uint8], ...]]:
    """The peer's generations, and its blocks in each region, readable only. `regions`: see
    `file_of`. Raises ValueError for what the file does not hold."""
    nbytes = max(region.address + region.extent(num_blocks) for region in regions)
    fd = _open_own(_SHM / name)
    try:
        pages = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    generations = np.frombuffer(pages, dtype=np.int64, count=num_blocks)
    whole = np.frombuffer(pages, dtype=np.uint8)
    views = (strided(whole, region.address, region, num_blocks) for region in regions)
    return generations, tuple(views)
