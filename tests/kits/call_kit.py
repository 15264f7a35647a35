"""What calls: messages to send, and what came; and how a server of gRPC begins its answer."""

from __future__ import annotations

import asyncio
from collections import deque

from crossdock.proto.http2 import frames
from crossdock.proto.http2.frames import settings
from crossdock.proto.http2.literals import block

PATH = "/crossdock.v1.Worker/Connect"
HEAD = block([(":status", "200"), ("content-type", "application/grpc")])
OPEN = settings(()) + frames.headers(1, HEAD, end=False)


class Caller:
    """Has messages to send, and keeps those that come."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = deque(messages)
        self.got: list[bytes] = []
        self.arrived = asyncio.Event()
        self.wanted = 1

    def next_message(self) -> bytes | None:
        return self.messages.popleft() if self.messages else None

    def receive(self, message: bytes) -> None:
        self.got.append(message)
        if len(self.got) >= self.wanted:
            self.arrived.set()
