"""The thread that transports share: how it ends."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from crossdock.kvtransfer.threaded import ThreadedTransport
from crossdock.kvtransfer.transport import Handle
from crossdock.proto.errors import TransferFailed


class Alone(ThreadedTransport):
    """Knows no peers."""

    def _no_peer(self, *_: object) -> Any:
        raise AssertionError("it has none")

    _described = _add = _settle_peer = _read = _fence = _no_peer


class Slow(Alone):
    """Has one transfer, which ends some turns after the transport was told to close."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.turns_left = 3
        self._start()

    def _open(self) -> None:
        pass

    def _progress(self) -> float | None:
        self.turns_left -= self._closing
        return 0.0 if self._closing and self.turns_left else None

    def _in_flight(self) -> int:
        return self.turns_left

    def _shut(self) -> None:
        pass


def test_closing_ends_with_the_last_transfer() -> None:
    transport = Slow()
    start = time.monotonic()
    transport.close()
    assert time.monotonic() - start < 2.0
    assert transport.turns_left == 0


class Quick(Alone):
    """Its reads end at once."""

    def __init__(self) -> None:
        super().__init__("quick")
        self._start()

    def read(self) -> Handle:
        return self._submit(self._finish)

    def _open(self) -> None:
        pass

    def _progress(self) -> float | None:
        return None

    def _in_flight(self) -> int:
        return 0

    def _shut(self) -> None:
        pass


def test_what_is_posted_while_it_closes_ends_too() -> None:
    for _ in range(50):
        transport = Quick()
        posted: list[Handle] = []

        def post(transport: Quick = transport, posted: list[Handle] = posted) -> None:
            while not posted or posted[-1].error is None:
                posted.append(transport.read())

        threads = [threading.Thread(target=post) for _ in range(2)]
        for thread in threads:
            thread.start()
        transport.close()
        for thread in threads:
            thread.join(10)
        assert all(handle.terminal for handle in posted)


def test_a_closed_one_writes_to_no_descriptor() -> None:
    """The number of its own may be somebody else's by then."""
    transport = Quick()
    transport.close()
    theirs = os.dup2(os.memfd_create("theirs"), transport._wake_fd)
    transport.expect_notifications(True)
    assert os.fstat(theirs).st_size == 0
    os.close(theirs)


def test_one_that_does_not_start_leaves_nothing_open() -> None:
    class Broken(Quick):
        def _open(self) -> None:
            raise TransferFailed("no such device")

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(TransferFailed, match="no such device"):
            Broken()
    assert len(os.listdir("/proc/self/fd")) == before
