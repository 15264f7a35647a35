"""Digests of whole files, remembered for as long as a file stays what it is. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crossdock.proto.errors import ModelError

SETTLED_S = 2.0  # file systems' clocks tick in ms: what changed just now may change again unseen


def weights_digest(files: Mapping[str, Path], records: Path) -> str:
    """SHA-256 over names and contents, hexadecimal; the same on every machine. Raises as below."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(
            lambda name: f"{name}={file_digest(files[name], records)}", sorted(files)
        )
        return hashlib.sha256("\n".join(["crossdock.weights.v2", *digests]).encode()).hexdigest()


def file_digest(path: Path, records: Path) -> str:
    """SHA-256 of all of a file, hexadecimal; from its record in the folder `records` where device,
    inode, size, mtime and ctime are the same (ctime moves with every write and cannot be set back).

    Raises OSError, or ModelError where the file changes while it is read.
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
        with contextlib.suppress(OSError):  # costs the next start a hash
            records.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps([identity, digest]))
    return digest


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
