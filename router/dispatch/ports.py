"""What the dispatcher acts with: timers and links, of an event loop or of a simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from crossdock.proto.v1 import worker_pb2 as pb


class Timer(Protocol):
    def cancel(self) -> None: ...


class Timers(Protocol):
    """An asyncio event loop is one."""

    def call_later(
        self, delay: float, callback: Callable[..., object], /, *args: object
    ) -> Timer: ...


class Link(Protocol):
    """The way to one worker."""

    sequences: dict[str, None]  # the ids of what this gateway has there now, oldest first

    @property
    def name(self) -> str: ...

    def send(self, frame: pb.GatewayFrame) -> None:
        """Returns at once. Dropped where the stream is gone."""


class Outgoing(Protocol):
    def get(self, name: str) -> Link | None:
        """The open link to the worker that holds this name now."""
