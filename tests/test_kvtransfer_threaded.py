"""The thread that transports share: how it ends."""

from __future__ import annotations

import time

from crossdock.kvtransfer.threaded import ThreadedTransport


class Slow(ThreadedTransport):
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
