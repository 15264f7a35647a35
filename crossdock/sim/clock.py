"""Virtual time: what happens next happens at once, however far away it is."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Event:
    """Something that is to happen. See router.dispatch.ports.Timer."""

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[object, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        """It will not happen."""
        self.callback, self.args = None, ()


class VirtualClock:
    """Seconds since the simulation began, and what is to happen when. Events of one moment happen
    in the order in which they were asked for. See router.dispatch.ports.Timers."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Event]] = []
        self._order = count()

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: object) -> Event:
        """Has `callback` called `delay` seconds from now."""
        return self.call_at(self.now + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], /, *args: object) -> Event:
        """The same at a time; one that is past is now."""
        event = Event(callback, args)
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), event))
        return event

    def run(self, done: Callable[[], bool]) -> None:
        """Goes on until `done`, which is asked after each event, or until nothing is to happen."""
        heap = self._heap
        while heap and not done():
            self.now, _, event = heapq.heappop(heap)
            if event.callback is not None:
                event.callback(*event.args)
