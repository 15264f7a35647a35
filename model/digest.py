"""Digests of whole files, remembered for as long as a file stays what it is. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crossdock.proto.errors import ModelError

# File systems count time in ticks of some ms: what changed just now may change again unseen.
SETTLED_S = 2.0


def weights_digest(files: Mapping[str, Path], records: Path) -> str:
    """SHA-256 over the names and contents of `files`, hexadecimal; the same on every machine.

    records: the folder that `file_digest` keeps its own in. Raises OSError, ModelError.
    """
    names = sorted(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: file_digest(files[name], records), names)
        lines = [f"{len(name)}:{name}={digest}" for name, digest in zip(names, digests)]
    return hashlib.sha256("\n".join(["crossdock.weights.v2", *lines]).encode()).hexdigest()


def file_digest(path: Path, records: Path) -> str:
    """SHA-256 of all of a file, hexadecimal.

    It is read again when device, inode, size, mtime or ctime are others than in the record: ctime
    changes with every write and cannot be set back. Raises OSError, or ModelError where the file
    changes while it is read.
    """
    identity = _identity(path)
    record = records / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        known, digest = json.loads(record.read_text())
        if known == identity:
            return str(digest)
    started = time.time()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _identity(path) != identity:
        raise ModelError(f"{path}: it was changed while it was read; try again")
    if max(identity[-2:]) / 1e9 < started - SETTLED_S:
        _write(record, json.dumps([identity, digest]))
    return digest


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _write(record: Path, content: str) -> None:
    """Whole or not at all; a folder that cannot be written to costs the next start a hash."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, record)
