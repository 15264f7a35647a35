"""Requests that come at once begin a few in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 8  # in a turn of the loop, some 5 ms of it


class Pace:
    """Where requests begin. Of many that come at once some begin, parties in turn, and before the
    next ones the loop carries what has come meanwhile: tokens of the streams under way among it."""

    def __init__(self) -> None:
        self._left = AT_ONCE  # that may begin in this turn
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by party, the next first

    async def begin(self, party: str) -> None:
        """Returns when one more of this party may begin: at once, unless others wait."""
        loop = asyncio.get_running_loop()
        if self._left == AT_ONCE:
            loop.call_soon(self._next_turn)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.setdefault(party, deque()).append(turn)
        await turn

    def _next_turn(self) -> None:
        self._left = AT_ONCE
        while self._waiting and self._left:
            party = next(iter(self._waiting))
            queue = self._waiting.pop(party)
            turn = queue.popleft()
            if queue:
                self._waiting[party] = queue
            if not turn.done():  # nor was cancelled
                turn.set_result(None)
                self._left -= 1
        if self._left < AT_ONCE:
            asyncio.get_running_loop().call_soon(self._next_turn)
