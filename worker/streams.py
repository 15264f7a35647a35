"""The gateways' streams: what each is still to be sent, merged so that a slow one costs little."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from crossdock.proto.v1 import worker_pb2 as pb


class GatewayStream:
    """Frames for one gateway. Those that wait for the network are merged into one. `wake` is called
    when there is a frame to `take`, or the stream is closed."""

    def __init__(self, owner: str, wake: Callable[[], None]) -> None:
        self.owner = owner
        self.closed = False
        self.deaf = False  # takes no new work: the role that it is of ends
        self.has_snapshot = False  # before it, nothing is published here
        # Decode requests whose peer is being met, and the hand-offs that came for them meanwhile.
        self.meetings: dict[str, list[pb.HandOff]] = {}
        self._frames: deque[pb.WorkerFrame] = deque()
        self._wake = wake

    def send(self, frame: pb.WorkerFrame) -> None:
        """Never blocks: frames that the network has not taken yet are merged. The frame is this
        stream's from now on."""
        last = self._frames[-1] if self._frames else None
        if last is None or _keeps_to_itself(last) or _keeps_to_itself(frame):
            self._frames.append(frame)
        else:
            _merge(last, frame)
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def take(self) -> pb.WorkerFrame | None:
        """The next frame to write; None: there is none now."""
        return self._frames.popleft() if self._frames else None


def _keeps_to_itself(frame: pb.WorkerFrame) -> bool:
    """A snapshot, since event numbers run on from frame to frame; and log-probabilities of prompts,
    whose frames would grow too large."""
    scores = (output.HasField("prompt_logprobs") for output in frame.outputs)
    return frame.block_events.snapshot or any(scores)


def _merge(into: pb.WorkerFrame, frame: pb.WorkerFrame) -> None:
    into.outputs.extend(frame.outputs)
    if frame.HasField("load"):
        into.load.CopyFrom(frame.load)
    into.placed.extend(frame.placed)
    into.computed.extend(frame.computed)
    if frame.HasField("block_events"):
        if not into.HasField("block_events"):
            into.block_events.first_sequence = frame.block_events.first_sequence
        into.block_events.events.extend(frame.block_events.events)


def block_events(
    first_sequence: int, events: list[tuple[bool, bytes]], snapshot: bool = False
) -> pb.BlockEvents:
    """(stored, block hash) pairs as a message; the first has the number `first_sequence`."""
    return pb.BlockEvents(
        first_sequence=first_sequence,
        events=[pb.BlockEvent(stored=stored, block_hash=name) for stored, name in events],
        snapshot=snapshot,
    )
