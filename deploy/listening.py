"""Which ports processes of this machine listen on, as /proc shows them."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_LISTENS = "0A"


@dataclass(frozen=True, order=True)
class Listening:
    """A TCP port: `host` is the address that it is bound to, as 127.0.0.1, 0.0.0.0 or ::."""

    process: str  # as `ps` shows it, without its folder
    pid: int
    host: str
    port: int

    @property
    def address(self) -> str:
        """host:port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def listening(pids: Iterable[int]) -> list[Listening]:
    """The ports of these processes, in order; one that several of them hold is there for each.
    Processes that have ended, or are another user's, have none."""
    bound = dict(_bound())
    return sorted(
        Listening(_name_of(pid), pid, *bound[inode])
        for pid in pids
        for inode in _sockets(pid) & bound.keys()
    )


def _bound() -> Iterator[tuple[str, tuple[str, int]]]:
    """The inode of each socket that listens, and its address."""
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS:
                host, _, port = fields[1].partition(":")
                yield fields[9], (_address(host), int(port, 16))


def _address(text: str) -> str:
    """Of the kernel's hexadecimal digits: words of 4 bytes, each in this machine's order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _sockets(pid: int) -> set[str]:
    found: set[str] = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if named := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry.path)):
                found.add(named[1])
    except OSError:
        pass  # it has ended, or is another user's
    return found


def _name_of(pid: int) -> str:
    """A Ray actor's name for itself, a Python process's script, or the program."""
    try:
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return ""
    if words[0].startswith("ray::"):
        return words[0].strip()
    scripts = [word for word in words[1:4] if word.endswith(".py")]
    return Path((scripts or words)[0]).name
