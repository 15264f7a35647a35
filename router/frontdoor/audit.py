"""The audit log of one gateway: one line for each request, whatever became of it; of those that
were refused the first of a kind, see audit_refusals.py.

Lines are made and written by a thread, a few times a second, and are on the disk when the thread is
done. A disk that takes nothing makes the gateway refuse requests, or drops lines and counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from prometheus_client import CollectorRegistry, Counter

from crossdock.proto.convert import sampling_to_pb
from crossdock.proto.errors import ConfigError, Unavailable
from crossdock.router.config import AuditSettings
from crossdock.router.dispatch.request import Ended, Request
from crossdock.router.frontdoor.audit_chain import (
    FIRST,
    Chain,
    head_of,
    line_hash,
    read_head,
    unlike_head,
)
from crossdock.router.frontdoor.audit_refusals import Refusals

log = logging.getLogger(__name__)

FLUSH_S = 0.2
MAX_PENDING = 10_000  # lines that wait for a disk that takes nothing
MAX_REFUSED = MAX_PENDING // 2  # where so many wait, none is kept of requests that were refused
TAIL_BYTES = 1 << 16


class AuditLog:
    """Appends to `settings.file`.NAME, where NAME is the gateway's."""

    def __init__(
        self,
        settings: AuditSettings,
        name: str,
        seed: bytes,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the file and goes on with its chain. Raises ConfigError."""
        self._settings = settings
        self._pending: list[dict[str, Any]] = []
        self._refusals = Refusals(clock)
        self._stopped = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._dropped = 0  # that no line has told of yet
        self._full = ""  # why nothing could be written last
        self._lines = Counter(
            "crossdock_audit_lines", "Lines of the audit log", ["result"], registry=registry
        )
        self.path = Path(f"{settings.file}.{name}")
        try:
            self._file = _File(self.path, seed, settings.rotate_mb * 1_000_000)
        except OSError as error:
            raise ConfigError("audit.file", f"{self.path}: {error.strerror}") from None
        log.info("audit log %s, signed by %s", self.path, self._file.chain.public)
        opened = {"kind": "opened", "time": time.time(), "gateway": name, "lost": self._file.lost}
        if why := self._file.unlike_head:
            log.error("audit log %s: is not as it was left: %s", self.path, why)
            opened["unlike_head"] = why
        self._pending.append(opened)

    def check(self) -> None:
        """Raises Unavailable where requests are to be refused, since no line can be written."""
        if self._settings.on_full != "refuse":
            return
        why = self._full or ("it waits for its disk" if len(self._pending) >= MAX_REFUSED else "")
        if why:
            raise Unavailable(f"the audit log cannot be written ({why}); try again later")

    def add(self, record: dict[str, Any]) -> None:
        """One request more, to be written soon. What was refused leaves room for what was served,
        and may be counted only."""
        if _is_refusal(record) and not self._refusals.separate(record):
            self._lines.labels("counted").inc()
            return
        most = MAX_PENDING if record.get("ended") is not None else MAX_REFUSED
        if len(self._pending) >= most:
            self._drop(1)
            return
        self._pending.append({"kind": "request", **record})

    def start(self) -> None:
        """Writes from now on, on the running loop, until it is closed."""
        self._writing = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), FLUSH_S)
            await self._flush()

    async def _flush(self) -> None:
        self._pending += self._refusals.told(everything=self._stopped.is_set())
        if not self._pending:
            return
        batch, self._pending = self._pending, []
        told = self._dropped
        if told:
            batch.append({"kind": "dropped", "time": time.time(), "count": told})
        try:
            await asyncio.to_thread(self._file.write, batch, self._settings.prompts == "keep")
        except Exception as error:  # of the disk mostly; none of them ends the log in silence
            self._failed(batch[: len(batch) - bool(told)], error)
            return
        self._dropped -= told
        self._lines.labels("written").inc(sum(r["kind"] == "request" for r in batch))
        if self._full:
            log.warning("audit log %s can be written again", self.path)
            self._full = ""

    async def close(self) -> None:
        """Writes what waits, and closes the file."""
        self._stopped.set()
        if self._writing is not None:
            await self._writing
        await self._flush()
        await asyncio.to_thread(self._file.close)

    def _failed(self, batch: list[dict[str, Any]], error: Exception) -> None:
        why = getattr(error, "strerror", None) or repr(error)
        if not self._full:
            then = (
                "requests are refused" if self._settings.on_full == "refuse" else "lines are lost"
            )
            log.error("audit log %s: %s; %s", self.path, why, then)
        self._full = why
        if self._settings.on_full == "refuse":
            self._pending = batch + self._pending
            return
        self._drop(sum(_requests_of(record) for record in batch))

    def _drop(self, count: int) -> None:
        self._dropped += count
        self._lines.labels("dropped").inc(count)


def _is_refusal(record: dict[str, Any]) -> bool:
    """Whether it ended badly before anything was started."""
    ended = record.get("ended")
    started = ended is not None and any(each.started for each in ended.sequences)
    return record.get("outcome", "ok") != "ok" and not started


def _requests_of(record: dict[str, Any]) -> int:
    """How many requests a line is of."""
    return int(record["count"]) if record["kind"] == "refused" else record["kind"] == "request"


class _File:
    """The file at the end of the chain. Belongs to one thread at a time."""

    def __init__(self, path: Path, seed: bytes, most_bytes: float) -> None:
        self._path, self._most_bytes = path, most_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._open()
        self.lost, n, prev = self._resume()
        self.chain = Chain(seed, n, prev)
        self.unlike_head = unlike_head(path, self.chain.public)
        if n == 0:
            with contextlib.suppress(OSError):  # a full disk is the first batch's to find
                self._write_head()

    def write(self, records: Sequence[dict[str, Any]], keep: bool) -> None:
        """Appends lines and a checkpoint; all of it, or nothing. Raises OSError."""
        before = self.chain.n, self.chain.prev
        size = os.fstat(self._fd).st_size
        try:
            lines = [self.chain.line(_told(record, keep)) for record in records]
            data = b"".join([*lines, self.chain.checkpoint(time.time())])
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fdatasync(self._fd)
            self._write_head()
        except Exception:
            self.chain.n, self.chain.prev = before
            os.ftruncate(self._fd, size)
            raise
        if size + len(data) > self._most_bytes:
            try:
                self._rotate()
            except OSError as error:  # what was written is written: it goes on in this file
                log.error("audit log %s: cannot be rotated: %s", self._path, error)

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise OSError(11, f"{self._path} is written by another gateway") from None
        return fd

    def _resume(self) -> tuple[int, int, str]:
        """Bytes of an unfinished line, which is taken off, and where the chain goes on."""
        size = os.fstat(self._fd).st_size
        tail = b""
        while len(tail) < size and tail.count(b"\n") < 2:
            start = max(0, size - len(tail) - TAIL_BYTES)
            tail = os.pread(self._fd, size - len(tail) - start, start) + tail
        whole, end, rest = tail.rpartition(b"\n")
        if rest:
            os.ftruncate(self._fd, size - len(rest))
        last = whole.rpartition(b"\n")[2] if end else b""
        if not last:
            return len(rest), *self._after_rotated()
        try:
            return len(rest), int(json.loads(last)["n"]) + 1, line_hash(last)
        except (ValueError, KeyError, TypeError):
            raise OSError(22, f"{self._path} is no audit log") from None

    def _after_rotated(self) -> tuple[int, str]:
        """Where the chain goes on in an empty file: as its head says."""
        head = read_head(self._path)
        return (head["lines"], head["hash"]) if head is not None else (0, FIRST)

    def _write_head(self) -> None:
        head = head_of(self._path)
        made = head.with_name(head.name + ".new")
        with made.open("wb") as file:
            file.write(self.chain.head())
        os.replace(made, head)

    def _rotate(self) -> None:
        taken = [int(p.suffix[1:]) for p in self._path.parent.glob(f"{self._path.name}.*")
                 if p.suffix[1:].isdigit()]  # fmt: skip
        rotated = f"{self._path}.{max(taken, default=0) + 1:06d}"
        os.rename(self._path, rotated)
        try:
            fresh = self._open()
        except OSError:
            os.rename(rotated, self._path)
            raise
        os.close(self._fd)
        self._fd = fresh


def _told(record: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A record with its request and end spelled out."""
    told = {k: v for k, v in record.items() if k not in ("request", "ended")}
    request, ended = record.get("request"), record.get("ended")
    if isinstance(request, Request):
        told["id"] = request.request_id
        told["choices_per_prompt"], told["priority"] = request.n, request.priority
        told["prompts"] = [tokens_of(prompt, keep) for prompt in request.prompts]
        told["parameters"] = MessageToDict(
            sampling_to_pb(request.sampling), preserving_proto_field_name=True
        )
    if isinstance(ended, Ended):
        told["seconds"] = round(ended.seconds, 6)
        told["choices"] = [
            {
                "index": each.index,
                **tokens_of(each.token_ids, keep),
                "finish_reason": each.finish_reason,
                "cached_tokens": each.cached_tokens,
                "prefill_worker": each.prefill_worker,
                "decode_worker": each.decode_worker,
                "events": {name: round(at, 6) for name, at in each.events.items()},
            }
            for each in ended.sequences
        ]
    return told


def tokens_of(ids: Sequence[int], keep: bool) -> dict[str, Any]:
    """How many there are and their SHA-256 (of their decimal numbers, with commas), and the ids
    themselves where they are kept."""
    plain = [int(token_id) for token_id in ids]
    digest = hashlib.sha256(",".join(map(str, plain)).encode()).hexdigest()
    told: dict[str, Any] = {"tokens": len(plain), "sha256": digest}
    return told | {"token_ids": plain} if keep else told
