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
