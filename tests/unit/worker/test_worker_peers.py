"""Whom a worker may pull from, without a network."""

from __future__ import annotations

import asyncio

import pytest

from crossdock.kvtransfer.fake import FakeNetwork
from crossdock.proto.errors import TransferFailed
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.peers import Peers


async def test_a_failed_meeting_that_nobody_waited_for_is_not_held_against_the_peer() -> None:
    """Its request was cancelled meanwhile; the next one finds the peer well."""
    peers = Peers(worker_pb2.KVLayout(), FakeNetwork())  # type: ignore[arg-type]
    well, asked, failing = worker_pb2.WorkerDescription(name="p"), asyncio.Event(), asyncio.Event()

    async def introduce(incarnation: bytes, address: str) -> worker_pb2.WorkerDescription:
        if asked.is_set():
            return well
        asked.set()
        await failing.wait()
        raise TransferFailed("busy")

    peers._introduce = introduce  # type: ignore[method-assign]
    request = asyncio.create_task(peers.ensure(b"i", "h:1"))
    await asked.wait()
    request.cancel()
    failing.set()
    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.sleep(0)
    assert await peers.ensure(b"i", "h:1") is well
