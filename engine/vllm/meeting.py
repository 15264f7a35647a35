"""Where the ranks of an engine find each other: a file by which torch.distributed has them meet."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "crossdock-ranks-"
_SHARED_MEMORY = Path("/dev/shm")


class Meeting:
    """A file in a folder of its own. The process that made it has the folder locked, which ends
    with the process however that ends; of those that are locked by nobody the next one made here
    removes what there is. Other users' are left alone."""

    def __init__(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            _remove_if_left(folder)
        self._folder, self._lock = _locked_folder()

    @property
    def method(self) -> str:
        """As torch.distributed takes it."""
        return f"file://{self._folder / self._folder.name}"

    def unlink_segments(self) -> None:
        """Of the shared memory in which ranks on a CPU exchange what they compute, once all have
        mapped it: vLLM names it after the file, and removes it in the end, which does not come to
        a process that is killed."""
        _unlink_segments(self._folder)

    def close(self) -> None:
        """Removes it; a second call does nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else another process took it for one that was left
            return folder, lock
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    try:
        if folder.lstat().st_uid != os.geteuid():
            return
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or no folder
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlink_segments(folder)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(lock)


def _unlink_segments(folder: Path) -> None:
    for segment in _SHARED_MEMORY.glob(f"{folder.name}-*-cpushm_*"):
        segment.unlink(missing_ok=True)
