"""The calls to other workers, over gRPC: who they are, and what becomes of their tickets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import TypeVar

import grpc

from crossdock.kvtransfer.layout import check_layouts
from crossdock.kvtransfer.transport import Transport
from crossdock.proto.channels import Channels
from crossdock.proto.errors import TransferFailed
from crossdock.proto.identity import Credentials
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.worker.peers import Met, Peers, Renewed

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_TIMEOUT_S = 5.0
# A link that dies and comes back is noticed both times within seconds, also by idle channels.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class GrpcPeerCalls:
    """See peers.PeerCalls. On the event loop; a task for each call."""

    def __init__(
        self, layout: pb.KVLayout, transport: Transport, credentials: Credentials | None = None
    ) -> None:
        self._layout = layout
        self._transport = transport
        self._channels = Channels(credentials, *CHANNEL_OPTIONS)
        self._meant: dict[str, str] = {}  # the incarnation that was met at an address
        self._meetings: dict[bytes, asyncio.Task[None]] = {}  # under way, or that went well
        self._tasks: set[asyncio.Task[None]] = set()

    def introduce(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        def answered(met: Met) -> None:
            if isinstance(met, TransferFailed):
                self._meetings.pop(incarnation, None)
                self._transport.remove_peer(incarnation)
            done(met)

        meeting = self._run(self._introduce(incarnation, address), answered)
        self._meetings[incarnation] = meeting

    def forget(self, incarnation: bytes) -> None:
        if meeting := self._meetings.pop(incarnation, None):
            meeting.cancel()
        self._transport.remove_peer(incarnation)

    def renew(
        self, address: str, ids: list[bytes], lease_s: float, done: Callable[[Renewed], None]
    ) -> None:
        request = pb.RenewLeasesRequest(ticket_ids=ids, lease_ms=int(1000 * lease_s))
        call = self._stub(address).RenewLeases(request, timeout=CALL_TIMEOUT_S)
        self._run(_answer(call, address), done)

    def release(self, address: str, ids: list[bytes]) -> None:
        def done(answer: object) -> None:
            if isinstance(answer, TransferFailed):
                log.info("tickets end with their leases: %s", answer)

        request = pb.ReleaseTicketsRequest(ticket_ids=ids)
        call = self._stub(address).ReleaseTickets(request, timeout=CALL_TIMEOUT_S)
        self._run(_answer(call, address), done)

    async def describe(self, incarnation: bytes, address: str) -> pb.WorkerDescription:
        """What that incarnation says of itself. Raises TransferFailed where it does not answer."""
        self._meant[address] = incarnation.hex()
        request = pb.DescribeRequest()
        call = self._stub(address).Describe(request, timeout=CALL_TIMEOUT_S)
        return await _answer(call, address)

    async def keep(self, addresses: Iterable[str]) -> None:
        """Closes the channels to all others."""
        kept = set(addresses)
        self._meant = {address: met for address, met in self._meant.items() if address in kept}
        await self._channels.keep(kept)

    async def _introduce(self, incarnation: bytes, address: str) -> pb.WorkerDescription:
        peer = await self.describe(incarnation, address)
        if peer.incarnation != incarnation:
            found = peer.incarnation.hex()
            raise TransferFailed(f"{address} is now {found}, not {incarnation.hex()}")
        check_layouts(self._layout, peer.layout)
        adding = asyncio.get_running_loop().run_in_executor(None, self._add, peer)

        def added(_: asyncio.Future[None]) -> None:
            if incarnation not in self._meetings:  # forgotten before the thread had added it
                self._transport.remove_peer(incarnation)

        adding.add_done_callback(added)
        await asyncio.shield(adding)
        return peer

    def _add(self, peer: pb.WorkerDescription) -> None:
        self._transport.add_peer(
            peer.incarnation, peer.transport_info, peer.num_blocks, peer.block_bytes
        )
        self._transport.warm(peer.incarnation)

    def _run(
        self, call: Coroutine[None, None, T], done: Callable[[T | TransferFailed], None]
    ) -> asyncio.Task[None]:
        """Has `done` called with what `call` gives, or with why it gave nothing."""

        async def answered() -> None:
            answer: T | TransferFailed
            try:
                answer = await call
            except TransferFailed as error:
                answer = error
            except Exception as error:
                answer = TransferFailed(f"cannot reach the peer: {error}")
            done(answer)

        task = asyncio.get_running_loop().create_task(answered())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stub(self, address: str) -> worker_pb2_grpc.WorkerStub:
        return worker_pb2_grpc.WorkerStub(
            self._channels.get(address, self._meant.get(address, "nobody"))
        )


async def met(peers: Peers, incarnation: bytes, address: str) -> pb.WorkerDescription:
    """Waits until blocks can be read from this peer. Raises TransferFailed saying why not."""
    answered: asyncio.Future[Met] = asyncio.get_running_loop().create_future()

    def then(met: Met) -> None:
        if not answered.done():
            answered.set_result(met)

    peers.ensure(incarnation, address, then)
    answer = await answered
    if isinstance(answer, TransferFailed):
        raise answer
    return answer


async def _answer(call: Awaitable[T], address: str) -> T:
    """What the peer answers. Raises TransferFailed saying why it did not."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise TransferFailed(f"{address} does not answer ({error.code().name})") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not this task but its call was cancelled, by the end of the channel.
        raise TransferFailed(f"{address} left the cluster") from None
