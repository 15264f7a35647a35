"""What a connection remembers of its client's manners: floods, pings, and streams that are over."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import Any

from crossdock.proto.http2.frames import Code, ConnectionFault
from crossdock.router.frontdoor.http2 import bounds
from crossdock.router.frontdoor.http2.bounds import Patience

RECENT = 256  # streams that are over and of which it is known by whom


class Ender(enum.Enum):
    """Who has ended a stream."""

    CLIENT = "client"  # both have
    SERVER = "server"  # by trailers; a client that sends on is told that nobody reads it
    RESET = "reset"  # by RST_STREAM: what still comes was on its way


@dataclass(slots=True)
class Block:
    """A head that is not whole yet."""

    stream_id: int
    flags: int
    data: bytes
    since: float


class Manners:
    """Of one client. Its methods raise ConnectionFault where something is too much."""

    __slots__ = (
        "_early_pings", "_forgotten", "_idle", "_over", "_pinged_at", "_resets", "_sent_then",
    )  # fmt: skip

    def __init__(self) -> None:
        self._over: dict[int, Ender] = {}  # oldest first
        self._forgotten = 0  # the newest of those that are not among them any more
        self._resets = Patience(bounds.RESETS, bounds.RESETS_PER_S, time.monotonic)
        self._idle = Patience(bounds.IDLE_FRAMES, bounds.IDLE_FRAMES_PER_S, time.monotonic)
        self._pinged_at = -bounds.PING_S
        self._sent_then = -1
        self._early_pings = 0

    def idle(self, what: str) -> None:
        """A frame that asks for nothing: so many are an attack."""
        if self._idle.tried():
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"too many {what}")

    def reset(self) -> None:
        """A stream ended in a reset, the client's, or ours for what it did, which costs as much."""
        if self._resets.tried():
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many streams are reset")

    def pinged(self, sent: int) -> None:
        """It did, when `sent` frames had gone to it: who gets something measures the way."""
        before, self._pinged_at = self._pinged_at, time.monotonic()
        if sent != self._sent_then:
            self._sent_then, self._early_pings = sent, 0
        elif self._pinged_at - before < bounds.PING_S:
            self._early_pings += 1
            if self._early_pings > bounds.MAX_EARLY_PINGS:
                raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too_many_pings")

    def ended(self, stream_id: int, ender: Ender) -> None:
        """A stream is over."""
        self._over[stream_id] = ender
        if len(self._over) > RECENT:
            oldest = next(iter(self._over))
            self._forgotten = max(self._forgotten, oldest)
            del self._over[oldest]

    def ender(self, stream_id: int) -> Ender | None:
        """Of a stream that was over lately."""
        return self._over.get(stream_id)

    def forgotten(self, stream_id: int) -> bool:
        """Whether this may be a stream that was over long ago."""
        return stream_id <= self._forgotten


def peer_name(address: Any) -> str:
    """An address as gRPC writes it."""
    if not isinstance(address, tuple):
        return "unix:"
    host, port = address[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
