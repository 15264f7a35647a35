"""A file that is read again when it changes; a broken one leaves the last good one in force."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from crossdock.proto.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")
Signature = tuple[int, ...]
GONE: Signature = ()


class WatchedFile(Generic[T]):
    """What `read` makes of a file's bytes: `value`. `read` raises ConfigError."""

    def __init__(self, path: str, read: Callable[[bytes], T]) -> None:
        """Reads it the first time. Raises ConfigError with the file's name."""
        self.path = Path(path)
        self.stale = False  # what is in force is not what the file says now
        self._read = read
        self._seen = self._signature()
        try:
            self.value = read(self.path.read_bytes())
        except OSError as error:
            raise ConfigError("file", f"cannot be read: {error.strerror}", path) from None
        except ConfigError as error:
            raise error.at(path) from None

    def poll(self) -> bool | None:
        """Whether a change was taken; None where there is none. Logs a line for each change. May
        wait for the disk."""
        found = self._signature()
        if found == self._seen:
            return None
        self._seen = found
        try:
            self.value = self._read(self._whole())
        except (OSError, ConfigError) as error:
            self.stale = True
            log.error("%s: %s; what it said before stays in force", self.path, error)
            return False
        self.stale = False
        log.info("%s: read again", self.path)
        return True

    def _whole(self) -> bytes:
        """Raises ConfigError for an empty file: it is about to be written."""
        data = self.path.read_bytes()
        if not data.strip():
            raise ConfigError("file", "is empty")
        return data

    def _signature(self) -> Signature:
        try:
            found = os.stat(self.path)
        except OSError:
            return GONE
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
