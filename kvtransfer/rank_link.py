"""The transport of a rank in another process of this worker, and what serves it there.

The connection between the two is this worker's own, to a process that it started.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from crossdock.kvtransfer.threaded import reason_of
from crossdock.kvtransfer.transport import (
    Handle,
    HandleState,
    PoolMemory,
    Transport,
    TransportStats,
)
from crossdock.proto.errors import TransferFailed

_CALL_TIMEOUT_S = 30.0  # more than a transport waits for its own thread
_START_TIMEOUT_S = 90.0
_GONE = "the process of a rank is gone"


class RankTransport:
    """See transport.Transport: of blocks alone. Generations are not read here, but to warm up."""

    def __init__(self, link: Connection) -> None:
        """`link`: to `serve` in the rank's process. Raises TransferFailed where its transport does
        not start."""
        self.stats = TransportStats()
        self._link = link
        self._sending = threading.Lock()
        self._numbers = count()
        self._asked: dict[int, Future[Any] | Handle] = {}
        self._wakeup: Callable[[], None] = lambda: None
        self._closed = False
        threading.Thread(target=self._listen, name="rank-link", daemon=True).start()
        self._info: bytes = self._call("info", timeout_s=_START_TIMEOUT_S)

    def info(self) -> bytes:
        return self._info

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        self._call("add_peer", incarnation, info, num_blocks, block_bytes)

    def remove_peer(self, incarnation: bytes) -> None:
        self._ask(Future(), "remove_peer", incarnation)

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        taken: float = self._call("warm", incarnation, timeout_s)
        return taken

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        handle = Handle()
        self._ask(handle, "read_blocks", incarnation, list(remote_ids), list(local_ids))
        return handle

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        """Fails: they are the first rank's."""
        handle = Handle()
        handle.fail("only the first rank has generations")
        return handle

    def notifications(self) -> list[bytes]:
        return []

    def expect_notifications(self, expected: bool) -> None:
        return

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        self._wakeup = callback

    def close(self) -> None:
        """Closes the transport there, which then ends the connection."""
        if self._closed:
            return
        with suppress(TransferFailed):  # its process has gone before
            self._call("close")
        self._closed = True

    def _call(self, method: str, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        answer: Future[Any] = Future()
        self._ask(answer, method, *args)
        try:
            return answer.result(timeout=timeout_s)
        except TimeoutError:
            raise TransferFailed(f"a rank did not answer in {timeout_s:g} s") from None

    def _ask(self, answer: Future[Any] | Handle, method: str, *args: object) -> None:
        number = next(self._numbers)
        self._asked[number] = answer
        try:
            with self._sending:
                if self._closed:
                    raise OSError(_GONE)
                self._link.send((number, method, args))
        except (OSError, ValueError):
            self._answered(number, None, _GONE)

    def _answered(self, number: int, value: object, error: str | None) -> None:
        answer = self._asked.pop(number, None)
        if isinstance(answer, Handle):
            if error is None:
                self.stats.reads += 1
                answer.finish()
            else:
                self.stats.failures += 1
                answer.fail(error)
            self._wakeup()
        elif answer is not None and error is None:
            answer.set_result(value)
        elif answer is not None:
            answer.set_exception(TransferFailed(error))

    def _listen(self) -> None:
        try:
            while True:
                self._answered(*self._link.recv())
        except (EOFError, OSError):
            for number in list(self._asked):
                self._answered(number, None, _GONE)
            with self._sending:  # nobody writes to what its number may stand for next
                self._link.close()


def serve(create: Callable[[PoolMemory], Transport], memory: PoolMemory, link: Connection) -> None:
    """In a rank's process: its transport, over its part of the pool. Returns when it is closed, or
    the other end of the link is."""
    with link:
        _Server(create(memory), link).run()


class _Server:
    def __init__(self, transport: Transport, link: Connection) -> None:
        self._transport, self._link = transport, link
        self._lock = threading.Lock()  # over what is sent and what is being read
        self._reads: dict[int, Handle] = {}
        self._callers = ThreadPoolExecutor(4, "rank-call")  # a peer that is slow delays no other
        transport.set_wakeup(self._tell)

    def run(self) -> None:
        try:
            while True:
                number, method, args = self._link.recv()
                if method == "read_blocks":
                    self._read(number, *args)
                elif method in ("add_peer", "warm"):
                    self._callers.submit(self._call, number, method, args)
                else:
                    self._call(number, method, args)
                if method == "close":
                    return
        except (EOFError, OSError):
            self._transport.close()
        finally:
            self._callers.shutdown(wait=False)

    def _read(self, number: int, *args: Any) -> None:
        handle = self._transport.read_blocks(*args)
        with self._lock:
            self._reads[number] = handle
        self._tell()  # where it has ended before

    def _call(self, number: int, method: str, args: tuple[Any, ...]) -> None:
        value, error = None, None
        try:
            value = getattr(self._transport, method)(*args)
        except Exception as raised:
            error = reason_of(raised)
        with self._lock:
            self._send(number, value, error)

    def _tell(self) -> None:
        """Of the reads that have ended. On the transport's thread, or this one's."""
        with self._lock:
            for number in [number for number, read in self._reads.items() if read.terminal]:
                read = self._reads.pop(number)
                self._send(number, None, read.error if read.state is HandleState.FAILED else None)

    def _send(self, number: int, value: object, error: str | None) -> None:
        with suppress(OSError, ValueError):  # nobody is left to be told
            self._link.send((number, value, error))
