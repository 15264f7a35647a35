"""What `crossdock doctor` asks of a worker: what runs here, and how well a peer's KV can be read.

A probe reads whatever some of the peer's blocks hold into blocks of this pool that nobody else has
meanwhile, and throws it away. It is small, and one at a time: running requests feel one short pull.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from crossdock.kvtransfer import traffic
from crossdock.kvtransfer.layout import check_layouts
from crossdock.kvtransfer.transport import Handle, HandleState, Transport
from crossdock.proto.errors import LayoutMismatch, Overloaded, TransferFailed
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.peer_calls import met

if TYPE_CHECKING:
    from crossdock.worker.role import WorkerRole
    from crossdock.worker.server import WorkerServer

T = TypeVar("T")

MAX_BLOCKS = 64
MAX_READ_BYTES = 64 << 20
BULK_READS = 3
SMALL_READS = 20
TURN_S = 5.0  # for the probe before this one, and for the engine thread to set blocks aside
HANDSHAKE_S = 10.0
READS_S = 5.0  # for all reads of one kind
PACKAGES = ("crossdock", "torch", "nixl", "ray")
TRANSPORT_PACKAGES = {"nccl": ("cupy-cuda13x", "nvidia-nccl-cu13")}


_OUTCOMES = {
    Overloaded: pb.LINK_OUTCOME_BUSY,
    LayoutMismatch: pb.LINK_OUTCOME_LAYOUT,
}


@dataclass(eq=False)
class _Hold:
    """Blocks set aside for one probe, given back when every read into them is terminal."""

    blocks: list[int] = field(default_factory=list)
    reads: list[Handle] = field(default_factory=list)


class Prober:
    """Measures reads between this worker and a peer for `crossdock doctor`, one probe at a time."""

    def __init__(self, server: WorkerServer, transport: Transport, memory_type: str) -> None:
        self._server = server
        self._transport = transport
        self._memory_type = memory_type
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()
        self._holds: list[_Hold] = []  # the engine thread's

    @property
    def held(self) -> list[list[int]]:
        """On the engine thread: block references that belong to probes."""
        return [hold.blocks for hold in self._holds]

    async def probe(self, request: pb.ProbeRequest) -> pb.ProbeResponse:
        """Versions, devices and, where asked for, a timed read. A failure is in the response."""
        response = pb.ProbeResponse(
            unix_s=time.time(),
            versions=_versions(self._server.config.transport),
            rdma_devices=traffic.rdma_devices(),
            host_id=traffic.host_id(),
            memory_type=self._memory_type,
        )
        config = self._server.config
        if config.transport == "nixl":
            response.ucx.update(_ucx_environment() | dict(config.transport_options))
        if request.peer_address:
            # A caller that goes away must not leave blocks behind: the task ends by itself.
            task = self._run(self._link(request))
            response.link.CopyFrom(await asyncio.shield(task))
        return response

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _link(self, request: pb.ProbeRequest) -> pb.LinkProbe:
        link = pb.LinkProbe()
        try:
            await asyncio.wait_for(self._turn.acquire(), TURN_S)
        except TimeoutError:
            _fail(link, Overloaded("another probe is running here"))
            return link
        try:
            await self._measure(request, link)
        finally:
            self._turn.release()
        return link

    async def _measure(self, request: pb.ProbeRequest, link: pb.LinkProbe) -> None:
        """`outcome` is what it means to fail where the probe has got to."""
        hold, peer_id = _Hold(), request.peer_incarnation
        try:
            link.outcome = pb.LINK_OUTCOME_UNREACHABLE
            peer = await self._handshake(request, link)
            link.outcome = pb.LINK_OUTCOME_READ_FAILED
            link.latency_s = await asyncio.to_thread(_latency, self._transport, peer_id)
            await self._set_aside(hold, peer)
            await asyncio.to_thread(_bandwidth, self._transport, peer, hold, link)
            link.outcome = pb.LINK_OUTCOME_OK
        except Exception as error:
            _fail(link, error)
        # Not where it was cancelled: the worker stops, and the thread above may still post reads.
        self._give_back(hold)

    async def _handshake(
        self, request: pb.ProbeRequest, link: pb.LinkProbe
    ) -> pb.WorkerDescription:
        start, wanted = time.perf_counter(), request.peer_incarnation
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                found = await self._server.peer_calls.describe(wanted, request.peer_address)
                if found.incarnation != wanted:
                    why = f"{request.peer_address} was restarted, or is another worker now"
                    raise TransferFailed(why)
                check_layouts(self._server.description.layout, found.layout)
                peer = await met(self._server.peers, wanted, request.peer_address)
        except TimeoutError:
            raise TransferFailed(f"no handshake within {HANDSHAKE_S:g} s") from None
        link.handshake_s = time.perf_counter() - start
        return peer

    # -- blocks --------------------------------------------------------------------------------

    async def _set_aside(self, hold: _Hold, peer: pb.WorkerDescription) -> None:
        most = min(MAX_BLOCKS, max(1, MAX_READ_BYTES // peer.block_bytes), peer.num_blocks)
        try:
            async with asyncio.timeout(TURN_S):
                await self._server.call(lambda role: self._allocate(role, hold, most))
        except TimeoutError:
            raise Overloaded(f"the engine did not turn over within {TURN_S:g} s") from None

    def _allocate(self, role: WorkerRole, hold: _Hold, most: int) -> None:
        """On the engine thread. Leaves half of what could be had to the requests."""
        pool = role.state.pool
        count = min(most, pool.num_available // 2)
        if count == 0:
            raise Overloaded(f"{pool.num_used} of {pool.num_blocks} KV blocks are in use")
        hold.blocks = pool.allocate(count)
        self._holds.append(hold)

    def _give_back(self, hold: _Hold) -> None:
        """Once no read can write any more. Commands run in order, so this comes after _allocate."""

        async def settled() -> None:
            while not all(read.terminal for read in hold.reads):
                await asyncio.sleep(0.05)
            self._server.post(lambda role: self._release(role, hold))

        self._run(settled())

    def _release(self, role: WorkerRole, hold: _Hold) -> None:
        """On the engine thread."""
        if hold in self._holds:
            self._holds.remove(hold)
            role.state.pool.release(hold.blocks)

    def _run(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


# -- reads: on a thread of their own, which may wait -------------------------------------------


def _latency(transport: Transport, incarnation: bytes) -> float:
    """Median seconds of reading one generation: what a fence costs at least."""
    deadline = time.monotonic() + READS_S
    read = partial(transport.read_generations, incarnation, [0], b"")
    return statistics.median(_seconds(read, deadline) for _ in range(SMALL_READS))


def _bandwidth(
    transport: Transport,
    peer: pb.WorkerDescription,
    hold: _Hold,
    link: pb.LinkProbe,
) -> None:
    link.blocks = len(hold.blocks)
    before = traffic.received()
    nbytes = link.blocks * peer.block_bytes
    link.bytes_per_s = nbytes / statistics.median(_bulk_reads(transport, peer, hold))
    link.bytes = BULK_READS * nbytes
    tcp, rdma = traffic.growth(before, traffic.received())
    link.MergeFrom(pb.LinkProbe(tcp_bytes=tcp, rdma_bytes=rdma))


def _bulk_reads(transport: Transport, peer: pb.WorkerDescription, hold: _Hold) -> Iterator[float]:
    """Seconds of each. Others of the peer's blocks every time: caches would make it look faster."""
    deadline = time.monotonic() + READS_S
    count = len(hold.blocks)

    def read(first: int) -> Handle:
        ids = range(first, first + count)
        hold.reads.append(transport.read_blocks(peer.incarnation, ids, hold.blocks))
        return hold.reads[-1]

    for number in range(BULK_READS):
        first = number * count % (peer.num_blocks - count + 1)
        yield _seconds(partial(read, first), deadline)


def _seconds(post: Callable[[], Handle], deadline: float) -> float:
    """From before a read is posted until it is done. Raises TransferFailed."""
    start = time.perf_counter()
    read = post()
    while not read.terminal:
        if time.monotonic() > deadline:
            raise TransferFailed(f"reads did not end within {READS_S:g} s")
        time.sleep(0.00002 if time.perf_counter() - start < 0.001 else 0.0002)
    if read.state is HandleState.FAILED:
        raise TransferFailed(read.error or "a read failed")
    return time.perf_counter() - start


def _fail(link: pb.LinkProbe, error: Exception) -> None:
    link.outcome = _OUTCOMES.get(type(error), link.outcome)
    link.message = str(error) or repr(error)


@cache
def _versions(transport: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *TRANSPORT_PACKAGES.get(transport, ())):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _ucx_environment() -> dict[str, str]:
    return {
        name.removeprefix("UCX_"): value
        for name, value in os.environ.items()
        if name.startswith("UCX_")
    }
