"""Timers, of an event loop or of a simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    def cancel(self) -> None: ...


class Timers(Protocol):
    """An asyncio event loop is one."""

    def call_later(
        self, delay: float, callback: Callable[..., object], /, *args: object
    ) -> Timer: ...
