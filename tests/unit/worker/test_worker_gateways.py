"""What a worker's gateways hear of its prefix cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.gateways import Gateways
from crossdock.worker.loop import Turn
from crossdock.worker.streams import block_events


def test_a_heartbeat_says_where_the_block_events_stand() -> None:
    snapshot = pb.WorkerFrame(block_events=block_events(2, [(True, b"a")], snapshot=True))
    host: Any = SimpleNamespace(
        post_snapshot=lambda begin, hello: begin(snapshot), public_description=None
    )
    gateways = Gateways(host)
    stream = gateways.open("g", lambda: None)
    assert stream.take() == snapshot

    def heard(turn: Turn) -> pb.BlockEvents | None:
        gateways.publish(turn)
        frame = stream.take()
        return frame.block_events if frame and frame.HasField("block_events") else None

    output = {stream.owner: [pb.SequenceOutput()]}
    assert heard(Turn(load=pb.Load())) == pb.BlockEvents(), "of before it can be no gap"
    assert heard(Turn(output, pb.Load(), 3, [(True, b"b"), (False, b"a")])) == block_events(
        3, [(True, b"b"), (False, b"a")]
    )
    assert heard(Turn(output, pb.Load(), 5)) is None, "a token's frame stays small"
    assert heard(Turn(load=pb.Load())) == pb.BlockEvents(first_sequence=5)


def test_what_several_gateways_are_told_is_each_ones_own() -> None:
    """Frames that wait are merged: a shared one would have gathered every stream's block events."""
    host: Any = SimpleNamespace(
        post_snapshot=lambda begin, hello: begin(
            pb.WorkerFrame(block_events=block_events(0, [], snapshot=True))
        ),
        public_description=None,
    )
    gateways = Gateways(host)
    streams = [gateways.open(name, lambda: None) for name in ("a", "b", "c")]
    for stream in streams:
        stream.take()
    gateways._told["s"] = streams[0].owner
    drawn = pb.SequenceOutput(sequence_id="s", token_ids=[1])
    events = [(True, b"x"), (True, b"y")]
    gateways.publish(Turn({streams[0].owner: [drawn]}, pb.Load(), 0, events))
    for other in streams[1:]:
        frame = other.take()
        assert frame is not None and list(frame.computed) == ["s"]
        assert frame.block_events == block_events(0, events)
        assert other.take() is None
