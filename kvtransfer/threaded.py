"""What transports with a library behind them share: the one thread that makes all its calls."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from crossdock.kvtransfer.regions import Runs, match_regions, merge_runs
from crossdock.kvtransfer.transport import (
    Generations,
    Handle,
    HandleState,
    PoolMemory,
    Region,
    TransportStats,
    check_ids,
)
from crossdock.proto.errors import TransferFailed

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 20.0
_CLOSING_POLL_S = 0.005
_CLOSE_GRACE_S = 2.0  # for transfers under way, whose memory is given back after close


@dataclass(eq=False)
class Peer:
    """Whom a transport reads from: one life of a process, and where its pool lies."""

    incarnation: bytes
    num_blocks: int
    regions: tuple[Region, ...]
    packed: Sequence[bool] = field(init=False)  # [regions] see match_regions
    removed: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """The incarnation in hexadecimal."""
        return self.incarnation.hex()


T = TypeVar("T")
P = TypeVar("P", bound=Peer)


class ThreadedTransport(ABC, Generic[P]):
    """Runs commands of other threads, then `_progress`, then sleeps as long as that allows.

    A subclass implements `info` and the hooks at the end, which run on the transport's thread
    only (`_described` excepted), and sets `_memory` before it calls `_start`.
    """

    _memory: PoolMemory

    def __init__(self, name: str) -> None:
        self.stats = TransportStats()
        self._peers: dict[bytes, P] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._notifications: deque[bytes] = deque()
        self._wakeup: Callable[[], None] = lambda: None
        self._news = False  # something the wakeup has to tell
        self._closing = False
        self._gone = False  # takes no command, has no descriptor
        self._gate = threading.Lock()  # over that, for whoever posts
        self._expecting = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # Called by any thread.

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """See Transport.add_peer. Raises TransferFailed, also where info and pool do not agree."""
        peer = self._described(incarnation, info)
        told = sum(region.nbytes for region in peer.regions)
        if (peer.num_blocks, told) != (num_blocks, block_bytes):
            raise TransferFailed(
                f"peer {peer.name} describes {num_blocks} blocks of {block_bytes} bytes, "
                f"its transport {peer.num_blocks} of {told}"
            )
        peer.packed = match_regions(peer.name, peer.regions, self._memory.regions)
        self._call(lambda: self._add(peer))

    def remove_peer(self, incarnation: bytes) -> None:
        """See Transport.remove_peer: done on the transport's thread."""
        if not self._closing:
            self._enqueue(lambda: self._remove(incarnation))

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        """See Transport.read_blocks: begun on the transport's thread."""

        def begin(handle: Handle) -> None:
            peer = self._peer(incarnation)
            check_ids(remote_ids, peer.num_blocks, "remote")
            check_ids(local_ids, self._memory.num_blocks, "local")
            if len(remote_ids):
                self._read(handle, peer, merge_runs(remote_ids, local_ids, peer.packed))
            else:
                self._finish(handle)

        return self._submit(begin)

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        """See Transport.read_generations: begun on the transport's thread."""

        def begin(handle: Handle) -> None:
            peer = self._peer(incarnation)
            check_ids(remote_ids, peer.num_blocks, "remote")
            self._fence(handle, peer, remote_ids, notify)

        return self._submit(begin)

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        """Reads entry 0 and waits; seconds taken. Raises TransferFailed, also after `timeout_s`."""
        handle = self.read_generations(incarnation, [0], b"")
        return wait_for(handle, timeout_s, f"warming up {incarnation.hex()}")

    def notifications(self) -> list[bytes]:
        return [self._notifications.popleft() for _ in range(len(self._notifications))]

    def expect_notifications(self, expected: bool) -> None:
        """While True the thread looks for them at each turn of its loop."""
        if expected != self._expecting:
            self._expecting = expected
            if expected:
                self._wake()

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        self._wakeup = callback

    def close(self) -> None:
        """Ends the thread, within seconds; a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join(_CALL_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("%s did not end within %g s", self._thread.name, _CALL_TIMEOUT_S)

    def _start(self) -> None:
        """Raises TransferFailed when the library does not come up."""
        self._thread.start()
        try:
            self._opened.result(timeout=60.0)
        except Exception as error:
            self._closing = True
            raise TransferFailed(f"transport did not start: {reason_of(error)}") from error

    def _call(self, function: Callable[[], T]) -> T:
        """Runs `function` on the transport's thread and waits for what it gives or raises."""
        if self._closing:
            raise TransferFailed("transport is closed")
        answer: Future[T] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        if not self._enqueue(command):
            raise TransferFailed("transport is closed")
        try:
            return answer.result(timeout=_CALL_TIMEOUT_S)
        except TimeoutError:
            answer.cancel()
            raise TransferFailed(f"transport did not answer in {_CALL_TIMEOUT_S:g} s") from None

    def _submit(self, begin: Callable[[Handle], None]) -> Handle:
        """Runs `begin` on the transport's thread; what it raises fails the handle."""
        handle = Handle()

        def command() -> None:
            try:
                begin(handle)
            except Exception as error:
                self._fail(handle, reason_of(error))

        if self._closing or not self._enqueue(command):
            handle.fail("transport is closed")
        return handle

    def _enqueue(self, command: Callable[[], None]) -> bool:
        """False: the thread has ended, or is about to."""
        with self._gate:
            if self._gone:
                return False
            self._commands.append(command)
        self._wake()
        return True

    def _wake(self) -> None:
        with self._gate:
            if not self._gone:
                with contextlib.suppress(BlockingIOError):  # awake already
                    os.eventfd_write(self._wake_fd, 1)

    # On the transport's thread.

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._leave()
            self._selector.close()
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        close_by = 0.0
        while True:
            if self._closing:
                close_by = close_by or time.monotonic() + _CLOSE_GRACE_S
                if not self._in_flight() or time.monotonic() > close_by:
                    break
            try:
                self._turn()
            except Exception:
                log.exception("%s goes on after an error", self._thread.name)
                time.sleep(0.01)
        self._leave()
        self._run_commands()
        try:
            self._shut()
        except Exception:
            log.exception("%s ended with an error", self._thread.name)
        self._tell()
        self._selector.close()

    def _leave(self) -> None:
        with self._gate:
            self._gone = True
            self._selector.unregister(self._wake_fd)
            os.close(self._wake_fd)

    def _turn(self) -> None:
        self._run_commands()
        timeout_s = self._progress()
        if self._commands:
            return  # what follows a read that has ended does not wait for anybody to be told
        if self._closing and (timeout_s is None or timeout_s > _CLOSING_POLL_S):
            timeout_s = _CLOSING_POLL_S  # nobody wakes it when the last transfer has ended
        self._tell()
        if timeout_s is not None and 0.0 < timeout_s < 0.001:
            time.sleep(timeout_s)  # the selector's timeout has only whole milliseconds
            timeout_s = 0.0
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            else:
                self._readable(key)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _tell(self) -> None:
        if self._news:
            self._news = False
            try:
                self._wakeup()
            except Exception:
                log.exception("wakeup of %s failed", self._thread.name)

    def _finish(self, handle: Handle) -> None:
        if handle.state is HandleState.PENDING:
            followed = handle.finish(handle.generations)
            self._news |= not followed

    def _fail(self, handle: Handle, reason: str) -> None:
        if handle.state is HandleState.PENDING:
            handle.fail(reason)
            self.stats.failures += 1
            self._news = True

    def _notified(self, ticket_id: bytes) -> None:
        self._notifications.append(ticket_id)
        self.stats.notifications += 1
        self._news = True

    def _remove(self, incarnation: bytes) -> None:
        if peer := self._peers.get(incarnation):
            peer.removed = True
            self._settle_peer(peer)

    def _peer(self, incarnation: bytes) -> P:
        peer = self._peers.get(incarnation)
        if peer is None or peer.removed:
            raise TransferFailed(f"peer {incarnation.hex()} is unknown")
        self._check_peer(peer)
        return peer

    def _end_read(self, handle: Handle, runs: Runs) -> None:
        """The blocks of these runs are here."""
        self.stats.reads += 1
        self.stats.blocks += runs.blocks
        self.stats.descriptors += len(runs)
        self.stats.bytes += runs.blocks * self._memory.block_bytes
        self._finish(handle)

    def _end_fence(self, handle: Handle, generations: Generations) -> None:
        handle.generations = generations
        self.stats.fences += 1
        self._finish(handle)

    # What a subclass does.

    @abstractmethod
    def _open(self) -> None:
        """Opens the library: from here on its calls are this thread's."""

    @abstractmethod
    def _described(self, incarnation: bytes, info: bytes) -> P:
        """The peer as its `info` describes it, on the caller's thread. Raises TransferFailed."""

    @abstractmethod
    def _add(self, peer: P) -> None:
        """Makes its pool readable, or raises TransferFailed."""

    def _check_peer(self, peer: P) -> None:
        """Raises TransferFailed for a known peer that is lost."""

    @abstractmethod
    def _settle_peer(self, peer: P) -> None:
        """Forgets a peer that is removed as soon as nothing is under way with it."""

    @abstractmethod
    def _read(self, handle: Handle, peer: P, runs: Runs) -> None:
        """Begins what ends with `_end_read` or `_fail`."""

    @abstractmethod
    def _fence(self, handle: Handle, peer: P, remote_ids: Sequence[int], notify: bytes) -> None:
        """Begins what ends with `_end_fence` or `_fail`."""

    @abstractmethod
    def _progress(self) -> float | None:
        """Moves everything along; returns how long the thread may sleep (None: until woken)."""

    def _readable(self, key: selectors.SelectorKey) -> None:
        """A descriptor that the subclass registered has something."""

    @abstractmethod
    def _in_flight(self) -> int:
        """How many transfers are not terminal."""

    @abstractmethod
    def _shut(self) -> None:
        """Gives back what the library holds."""


def wait_for(handle: Handle, timeout_s: float, what: str) -> float:
    """Seconds until the handle was done, looking now and then. Raises TransferFailed."""
    start = time.perf_counter()
    while not handle.terminal:
        if time.perf_counter() - start > timeout_s:
            raise TransferFailed(f"{what}: nothing in {timeout_s:g} s")
        time.sleep(0.0002)
    if handle.state is HandleState.FAILED:
        raise TransferFailed(f"{what}: {handle.error}")
    return time.perf_counter() - start


def polling_pause(busy_s: float) -> float:
    """Seconds to sleep between two looks at transfers: a fence ends within a fraction of a
    millisecond, a bulk read over TCP in tens of them."""
    return 0.0 if busy_s < 0.0003 else 0.00005 if busy_s < 0.005 else 0.0005


def reason_of(error: BaseException) -> str:
    """What a failed handle says: a TransferFailed in its own words, others with their type."""
    if isinstance(error, TransferFailed):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
