"""Room that parties share."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from crossdock.proto.errors import Overloaded


class Shares:
    """Room for some `most` bytes. Where it is full, a party that has its share of it gets no more;
    one that has nothing always gets what it asks for."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()  # bytes, by party

    @contextlib.contextmanager
    def taken(self, party: str, size: int) -> Iterator[None]:
        """Around what holds so many bytes. Raises Overloaded."""
        has = self._held[party]
        full = self._held.total() + size > self._most
        if full and has and has + size > self._most / len(self._held):
            why = f"{has} bytes of this client's wait to be read, its share of {self._most}"
            raise Overloaded(f"{why}, and {size} more do not fit")
        self._held[party] += size
        try:
            yield
        finally:
            self._held[party] -= size
            if not self._held[party]:
                del self._held[party]
