"""Workers that share the cores of one host, and so slow each other down."""

from __future__ import annotations

from collections.abc import Callable


class Host:
    """Who computes now. Each is told how many others do whenever that changes."""

    def __init__(self) -> None:
        self._busy: dict[object, Callable[[int], None]] = {}

    def enter(self, worker: object, others: Callable[[int], None]) -> None:
        """This one computes from now on."""
        if worker not in self._busy:
            self._busy[worker] = others
            self._tell()

    def leave(self, worker: object) -> None:
        """It does not."""
        if self._busy.pop(worker, None) is not None:
            self._tell()

    def _tell(self) -> None:
        for others in list(self._busy.values()):
            others(len(self._busy) - 1)
