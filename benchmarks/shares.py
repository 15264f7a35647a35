"""Fixed shares of this machine's cores, by Linux control groups: what a process gets does not
depend on what others do, as if it had hardware of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
PERIOD_US = 5_000  # a share is given so often: the less, the smoother


@contextlib.contextmanager
def own_share(pids: Iterable[int], cores: float) -> Iterator[str]:
    """Each of these processes gets `cores` at the most until the block is left. Yields why that
    could not be had, empty where it could."""
    groups: list[Path] = []
    try:
        why = ""
        try:
            for pid in pids:
                groups.append(_group(pid, cores))
        except OSError as error:
            why = f"{error.strerror}: {error.filename}"
        yield why
    finally:
        for group in groups:
            _dissolve(group)


def _group(pid: int, cores: float) -> Path:
    quota_us = round(cores * PERIOD_US)
    if (V1 / "cpu.cfs_quota_us").exists():
        group = V1 / f"crossdock-{os.getpid()}-{pid}"
        limits = {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{quota_us}"}
    else:
        group = V2 / f"crossdock-{os.getpid()}-{pid}"
        limits = {"cpu.max": f"{quota_us} {PERIOD_US}"}
    group.mkdir()
    try:
        for name, text in {**limits, "cgroup.procs": str(pid)}.items():
            (group / name).write_text(text)
    except OSError:
        _dissolve(group)
        raise
    return group


def _dissolve(group: Path) -> None:
    """Its processes go back to where the groups are."""
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            (group.parent / "cgroup.procs").write_text(pid)
    with contextlib.suppress(OSError):
        group.rmdir()
