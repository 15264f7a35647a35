"""Requests that come at once begin a few in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 8  # in a turn of the loop, some 5 ms of it


class Pace:
    """Where requests begin. Of many that come at once some begin, and before the next ones the loop
    carries what has come meanwhile: tokens of the streams under way among it."""

    def __init__(self) -> None:
        self._left = AT_ONCE  # that may begin in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def begin(self) -> None:
        """Returns when one more may begin: at once, or in order of the calls."""
        loop = asyncio.get_running_loop()
        if self._left == AT_ONCE and not self._waiting:
            loop.call_soon(self._next_turn)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._left = AT_ONCE
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # nor was cancelled
                turn.set_result(None)
                self._left -= 1
        if self._left < AT_ONCE:
            asyncio.get_running_loop().call_soon(self._next_turn)
