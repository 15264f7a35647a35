"""What the kernel says of bytes that arrived: UCX does not tell an application which path it took.

TCP is counted for each socket of this process (TCP_INFO), RDMA for each port of the machine. Shared
memory and NVLink are counted nowhere: they are what is left on one machine when neither grew.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

K = TypeVar("K", int, str)

_RDMA = Path("/sys/class/infiniband")
_BYTES_RECEIVED = struct.Struct("=128xQ")  # tcpi_bytes_received of struct tcp_info, Linux 4.1


@dataclass(frozen=True)
class Received:
    """Bytes since each counter began. None: this system does not say."""

    tcp: dict[int, int] | None  # by the socket's inode
    rdma: dict[str, int] | None  # by device and port


def received() -> Received:
    """The counters as they stand now, to be compared by `growth`."""
    return Received(_tcp(), _rdma())


def growth(before: Received, after: Received) -> tuple[int | None, int | None]:
    """By how many bytes the counters of TCP, and those of RDMA, rose from `before` to `after`."""
    return _grown(before.tcp, after.tcp), _grown(before.rdma, after.rdma)


def rdma_devices() -> list[str]:
    """Names of the machine's RDMA devices that this process can see."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(_RDMA))
    return []


def host_id() -> str:
    """Equal for all processes of one machine, in whatever container, until it boots again."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _grown(before: dict[K, int] | None, after: dict[K, int] | None) -> int | None:
    if before is None or after is None:
        return None
    return sum(max(0, count - before.get(key, 0)) for key, count in after.items())


def _tcp() -> dict[int, int] | None:
    counts: dict[int, int] = {}
    try:
        descriptors = os.listdir("/proc/self/fd")
    except OSError:
        return None
    for descriptor in descriptors:
        # Others open and close theirs meanwhile.
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as each:
                if each.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if each.type != socket.SOCK_STREAM:
                    continue
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) < _BYTES_RECEIVED.size:
                    return None
                counts[os.fstat(each.fileno()).st_ino] = _BYTES_RECEIVED.unpack_from(info)[0]
    return counts


def _rdma() -> dict[str, int] | None:
    counts: dict[str, int] = {}
    for device in rdma_devices():
        ports = list((_RDMA / device / "ports").glob("*"))
        for port in ports:
            try:
                words = int((port / "counters" / "port_rcv_data").read_text())
            except (OSError, ValueError):
                return None
            counts[f"{device}:{port.name}"] = 4 * words  # counted in units of four bytes
    return counts
