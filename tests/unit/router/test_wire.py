"""A wire over gRPC: its streams' lives, one after another, and what travels together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc
import pytest

from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.router.dispatch import streams
from crossdock.router.dispatch.links import WorkerLink
from crossdock.router.dispatch.streams import GrpcWire

WAIT_S = 100.0
FRAME = pb.WorkerFrame(load=pb.Load(free_blocks=1))


class Link:
    """What a wire tells its link. Its stream is opened `lives` times."""

    name = "worker-0"

    def __init__(self, address: str, lives: int = 1) -> None:
        self.endpoint = WorkerEndpoint(self.name, "prefill", Role.PREFILL, address, "0" * 32)
        self.frames: asyncio.Queue[pb.WorkerFrame] = asyncio.Queue()
        self.ends: asyncio.Queue[str] = asyncio.Queue()
        self.lives = lives
        self.take: Callable[[pb.WorkerFrame], str] = lambda frame: ""

    @property
    def hello(self) -> pb.GatewayFrame:
        return pb.GatewayFrame(hello=pb.GatewayHello(gateway="gateway-0"))

    def receive(self, frame: pb.WorkerFrame) -> str:
        self.frames.put_nowait(frame)
        return self.take(frame)

    def ended(self, reason: str) -> float | None:
        self.ends.put_nowait(reason)
        self.lives -= 1
        return 0.0 if self.lives else None


class Worker(worker_pb2_grpc.WorkerServicer):
    """Greets, keeps what it hears, and ends where it is told to."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[pb.GatewayFrame] = asyncio.Queue()
        self.reads, self.done = asyncio.Event(), asyncio.Event()
        self.reads.set()

    async def Connect(self, frames: Any, context: Any) -> AsyncIterator[pb.WorkerFrame]:
        yield FRAME
        self.heard.put_nowait(await anext(aiter(frames)))
        reading = asyncio.create_task(self._read(frames))
        try:
            await self.done.wait()
        finally:
            reading.cancel()

    async def _read(self, frames: Any) -> None:
        await self.reads.wait()
        async for frame in frames:
            self.heard.put_nowait(frame)


@contextlib.asynccontextmanager
async def wired(lives: int = 1) -> AsyncIterator[tuple[Worker, Link, GrpcWire]]:
    """A wire whose stream is open."""
    server, worker = grpc.aio.server(), Worker()
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    link = Link(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", lives)
    await server.start()
    wire = GrpcWire(cast(WorkerLink, link), None)
    try:
        async with asyncio.timeout(WAIT_S):
            await link.frames.get()
            yield worker, link, wire
    finally:
        wire.close()
        await asyncio.gather(wire.task, return_exceptions=True)
        await server.stop(None)


def cancel(name: str, size: int = 0) -> pb.GatewayFrame:
    return pb.GatewayFrame(cancel=pb.CancelRequest(sequence_id=name + "." * size))


async def test_what_waits_together_is_one_message_and_the_hello_is_alone() -> None:
    async with wired() as (worker, _, wire):
        for number in range(5):
            wire.send(cancel(str(number), 300 if number == 3 else 0))
        assert (await worker.heard.get()).HasField("hello")
        first = await worker.heard.get()
        names = [each.cancel.sequence_id.rstrip(".") for each in (first, *first.more)]
        assert names == ["0", "1", "2", "3", "4"]
        half = streams.MOST_TOGETHER_BYTES // 2
        for number in range(3):
            wire.send(cancel(str(number), half))
        sizes = [1 + len((await worker.heard.get()).more) for _ in range(3)]
        assert sizes == [1, 1, 1]


async def test_a_stream_after_another_each_with_a_hello_and_one_end() -> None:
    async with wired(lives=3) as (worker, link, wire):
        worker.done.set()
        for _ in range(3):
            assert await link.ends.get() == "the worker closed the stream"
        await wire.task
        assert [(await worker.heard.get()).HasField("hello") for _ in range(3)] == [True] * 3
        assert link.ends.empty()
        wire.send(cancel("dropped"))
        wire.cut("nothing")
        assert link.ends.empty()


async def test_a_link_that_has_enough_ends_the_stream() -> None:
    async with wired(lives=2) as (_, link, wire):
        link.take = lambda frame: "it left the cluster"
        wire.cut("silent for 5 s")
        assert await link.ends.get() == "silent for 5 s"
        assert await link.ends.get() == "it left the cluster"
        await wire.task


async def test_a_frame_that_cannot_be_taken_ends_the_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(frame: pb.WorkerFrame) -> str:
        raise KeyError("a defect")

    async with wired(lives=2) as (_, link, wire):
        link.take = fail
        wire.cut("again")
        assert await link.ends.get() == "again"
        assert await link.ends.get() == "KeyError: 'a defect'"
    assert "worker-0: its stream could not be read" in caplog.text


async def test_what_a_worker_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_WAITING_BYTES", 4 << 20)
    async with wired() as (worker, link, wire):
        worker.reads.clear()
        while link.ends.empty():
            wire.send(cancel("x", 1 << 16))
            await asyncio.sleep(0)
        assert (await link.ends.get()).endswith("bytes wait for the worker to read")


async def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HELLO_TIMEOUT_S", 0.05)
    silent = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with silent:
        link = Link(address, lives=2)
        wire = GrpcWire(cast(WorkerLink, link), None)
        async with asyncio.timeout(WAIT_S):
            assert await link.ends.get() == "no hello within 0.05 s"
            silent.close()
            await wire.task
    link = Link(address)
    wire = GrpcWire(cast(WorkerLink, link), None)
    async with asyncio.timeout(WAIT_S):
        assert (await link.ends.get()).startswith(("UNAVAILABLE: ", "no hello"))
        await wire.task
