"""Shared-memory pools: nothing of ours stays under /dev/shm, however a process ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from freeze import freeze
from transport_kit import BLOCK_BYTES, NUM_BLOCKS, Pool, ProcessPeer, later

from crossdock.kvtransfer.local import LocalTransport
from crossdock.kvtransfer.registry import allocate
from crossdock.kvtransfer.shared_memory import allocate_segment, cleanup_stale, map_pool
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import HandleState, PoolMemory, Region
from crossdock.proto.errors import TransferFailed

OWNER = """
import os, sys
from crossdock.kvtransfer.shared_memory import allocate_segment
pool = allocate_segment(1 << 16, 16)
print([name for name in os.listdir("/dev/shm") if f"crossdock-{os.getpid()}-" in name][0])
sys.stdout.flush()
sys.stdin.read()
"""


def path_of(name: str) -> Path:
    return Path("/dev/shm") / name


def spawn_owner() -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=20)


def test_the_pool_of_a_killed_process_is_removed_and_a_live_one_is_not() -> None:
    (dead, dead_name), (live, live_name) = spawn_owner(), spawn_owner()
    dead.kill()
    end(dead)
    assert path_of(dead_name).exists()
    removed = cleanup_stale()
    assert dead_name in removed
    assert live_name not in removed
    assert not path_of(dead_name).exists()
    assert path_of(live_name).exists()
    end(live)  # its input ends, and so does it, without having closed its pool
    assert not path_of(live_name).exists()


def test_allocating_cleans_up_first() -> None:
    dead, name = spawn_owner()
    dead.kill()
    end(dead)
    _, _, close = allocate_segment(4096, 1)
    assert not path_of(name).exists()
    close()


def test_memory_is_zeroed_aligned_and_given_back() -> None:
    for transport in ("local", "nixl"):
        before = set(Path("/dev/shm").glob("crossdock-*"))
        buffer, generations, close = allocate(transport, 10_000, 700)
        assert (buffer.shape, buffer.dtype) == ((10_000,), np.uint8)
        assert (generations.shape, generations.dtype) == ((700,), np.int64)
        assert buffer.ctypes.data % 4096 == 0
        assert generations.ctypes.data % 8 == 0
        assert not buffer.any()
        assert not generations.any()
        buffer[:] = 1
        generations[:] = 2
        assert buffer.sum() == 10_000  # they don't overlap
        close()
        close()
        assert set(Path("/dev/shm").glob("crossdock-*")) <= before


def test_no_room_is_an_error_that_says_so() -> None:
    with pytest.raises(TransferFailed, match=r"no shared memory for a KV pool of \d+ bytes"):
        allocate_segment(1 << 50, 16)


def test_private_memory_is_refused() -> None:
    buffer, generations, close = allocate("nixl", 4096, 1)
    with pytest.raises(TransferFailed, match="shared memory"):
        LocalTransport(
            new_incarnation(), PoolMemory.block_major(buffer.ctypes.data, 1, 4096, generations)
        )
    close()


def test_releases_to_a_busy_peer_wait_for_it() -> None:
    pool, peer = Pool("local"), ProcessPeer("local", 1)
    try:
        pool.transport.add_peer(peer.incarnation, peer.info, NUM_BLOCKS, BLOCK_BYTES)
        freeze(peer.pid)
        tickets = [peer.ticket([1]) for _ in range(2000)]  # far more than its socket holds
        handles = [
            pool.transport.read_generations(peer.incarnation, [1], ticket.ticket_id)
            for ticket in tickets
        ]
        end = later()
        while not all(handle.terminal for handle in handles) and time.monotonic() < end:
            threading.Event().wait(0.01)
        assert {handle.state for handle in handles} == {HandleState.DONE}
        os.kill(peer.pid, signal.SIGCONT)
        assert peer.releases(*tickets)
    finally:
        peer.kill()
        pool.close()


SEGMENT = (
    b'{"segment": "crossdock-1-00000000000000000000000000000000", "num_blocks": 1, "regions": %s}'
)


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"[]",
        b'{"segment": "../etc/passwd", "num_blocks": 1, "regions": [[4096, 4096, 4096]]}',
        SEGMENT % b"[[1, 4096, 4096]]",  # over the generations
        SEGMENT % b"[[4096, 2048, 4096]]",
        SEGMENT % b"[[4096, 0, 0]]",
        SEGMENT % b"[[-4096, 4096, 4096]]",
        SEGMENT % b"[]",
    ],
)
def test_info_that_names_no_pool_is_refused(info: bytes) -> None:
    buffer, generations, close = allocate("local", 4096, 1)
    transport = LocalTransport(
        new_incarnation(), PoolMemory.block_major(buffer.ctypes.data, 1, 4096, generations)
    )
    with pytest.raises(TransferFailed, match="transport info"):
        transport.add_peer(new_incarnation(), info, 1, 4096)
    transport.close()
    close()


def test_a_pool_is_its_users_alone() -> None:
    process, name = spawn_owner()
    try:
        about = path_of(name).stat()
        assert stat.S_IMODE(about.st_mode) == 0o600 and about.st_uid == os.geteuid()
    finally:
        end(process)


@pytest.mark.timeout(20)
def test_what_another_put_under_a_pools_name_is_left_alone(tmp_path: Path) -> None:
    """Opening a pipe waits for its writer, and so did each worker's start."""
    pipe, link, foreign = (path_of(f"crossdock-1-{secrets.token_hex(16)}") for _ in range(3))
    (tmp_path / "elsewhere").write_bytes(bytes(4096))
    try:
        os.mkfifo(pipe)
        link.symlink_to(tmp_path / "elsewhere")
        foreign.write_bytes(bytes(4096))
        with contextlib.suppress(PermissionError):  # root alone gives files away
            os.chown(foreign, 65534, 65534)
        removed = cleanup_stale()
        assert not {pipe.name, link.name} & set(removed)
        assert pipe.exists() and link.is_symlink()
        assert foreign.exists() == (os.geteuid() == 0)
        for path in (pipe, link):
            with pytest.raises(OSError):
                map_pool(path.name, 1, [Region(0, 4096, 4096)])
    finally:
        for path in (pipe, link, foreign):
            path.unlink(missing_ok=True)
