"""The gateways' streams: what each is still to be sent, merged so that a slow one costs little."""

from __future__ import annotations

import asyncio
from collections import deque

from crossdock.proto.v1 import worker_pb2


class GatewayStream:
    """Frames for one gateway. Those that wait for the network are merged into one."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._frames: deque[worker_pb2.WorkerFrame] = deque()
        self._ready = asyncio.Event()
        self._closed = False

    def send(self, frame: worker_pb2.WorkerFrame) -> None:
        # Event numbers run on from frame to frame, so only a snapshot must keep to itself.
        last = self._frames[-1] if self._frames else None
        if last is None or last.block_events.snapshot or frame.block_events.snapshot:
            self._frames.append(frame)
        else:
            _merge(last, frame)
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def next_frame(self) -> worker_pb2.WorkerFrame | None:
        """The next frame to write; None once the stream is closed."""
        while not self._frames:
            if self._closed:
                return None
            self._ready.clear()
            await self._ready.wait()
        return self._frames.popleft()


def _merge(into: worker_pb2.WorkerFrame, frame: worker_pb2.WorkerFrame) -> None:
    into.outputs.extend(frame.outputs)
    if frame.HasField("load"):
        into.load.CopyFrom(frame.load)
    if frame.HasField("block_events"):
        if not into.HasField("block_events"):
            into.block_events.first_sequence = frame.block_events.first_sequence
        into.block_events.events.extend(frame.block_events.events)


def block_events(
    first_sequence: int, events: list[tuple[bool, bytes]], snapshot: bool = False
) -> worker_pb2.BlockEvents:
    return worker_pb2.BlockEvents(
        first_sequence=first_sequence,
        events=[worker_pb2.BlockEvent(stored=stored, block_hash=name) for stored, name in events],
        snapshot=snapshot,
    )
