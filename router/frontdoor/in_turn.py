"""One at a time, and parties in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class InTurn:
    """Who has what there is one of. Parties that wait take turns, so that nobody waits for more
    than one of each other party, however many that has."""

    def __init__(self) -> None:
        self._taken = False
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # by party, the next first

    def waiting(self, party: str | None = None) -> int:
        """How many wait, of all or of one party."""
        if party is not None:
            return len(self._queues.get(party, ()))
        return sum(map(len, self._queues.values()))

    def join(self, party: str) -> asyncio.Future[None]:
        """Done when it is this one's turn, which is to be ended by `next`; one that is cancelled
        has none."""
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(party, deque()).append(turn)
        if not self._taken:
            self.next()
        return turn

    def next(self) -> None:
        """The turn goes to the next party, which comes behind all others then."""
        self._taken = False
        while self._queues and not self._taken:
            party = next(iter(self._queues))
            queue = self._queues.pop(party)
            turn = queue.popleft()
            if queue:
                self._queues[party] = queue
            if not turn.done():
                turn.set_result(None)
                self._taken = True

    @contextlib.asynccontextmanager
    async def turn(self, party: str) -> AsyncIterator[None]:
        """Waits for a turn, and ends it."""
        mine = self.join(party)
        try:
            await mine
            yield
        finally:
            if not mine.cancelled():
                self.next()
