"""A worker's view of the other workers: whom it may pull from, and calls about their tickets."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Iterable
from functools import partial
from typing import TypeVar

import grpc

from crossdock.kvtransfer.layout import check_layouts
from crossdock.kvtransfer.transport import Transport
from crossdock.proto.errors import TransferFailed
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_TIMEOUT_S = 5.0
# A link that dies and comes back is noticed both times within seconds, also by idle channels.
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class Peers:
    """Keyed by incarnation: a restarted worker on the same address is another peer."""

    def __init__(self, layout: worker_pb2.KVLayout, transport: Transport) -> None:
        self._layout = layout
        self._transport = transport
        self._known: dict[bytes, asyncio.Task[worker_pb2.WorkerDescription]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._updating = asyncio.Lock()

    async def update(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """The prefill workers among `endpoints` become the peers; a bad one is left out."""
        wanted = {bytes.fromhex(e.incarnation): e for e in endpoints if e.role is Role.PREFILL}
        async with self._updating:
            for incarnation in [known for known in self._known if known not in wanted]:
                await self._drop(incarnation)
            meetings = (self.ensure(key, endpoint.address) for key, endpoint in wanted.items())
            results = await asyncio.gather(*meetings, return_exceptions=True)
            for endpoint, result in zip(wanted.values(), results):
                if isinstance(result, BaseException):
                    log.warning("no KV from %s: %s", endpoint.name, result)
            for address in self._channels.keys() - {e.address for e in wanted.values()}:
                await self._channels.pop(address).close()

    async def ensure(self, incarnation: bytes, address: str) -> worker_pb2.WorkerDescription:
        """Returns once blocks can be read from this peer. Raises TransferFailed saying why not."""
        task = self._known.get(incarnation)
        if task is None:
            task = asyncio.create_task(self._introduce(incarnation, address))
            self._known[incarnation] = task
            task.add_done_callback(partial(self._met, incarnation))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise TransferFailed(f"{address} left the cluster") from None
            raise

    async def describe(self, address: str) -> worker_pb2.WorkerDescription:
        """Who answers there now. Raises TransferFailed where nobody does."""
        request = worker_pb2.DescribeRequest()
        call = self._stub(address).Describe(request, timeout=CALL_TIMEOUT_S)
        peer = await _answer(call, address)
        assert isinstance(peer, worker_pb2.WorkerDescription)
        return peer

    async def renew(
        self, tickets: Iterable[tuple[str, bytes]], lease_s: float
    ) -> tuple[set[bytes], set[bytes]]:
        """Extends leases, one call a peer. Returns the ids renewed and the ids lost.

        A peer that does not answer leaves its tickets as they were: their leases run on.
        """
        renewed: set[bytes] = set()
        lost: set[bytes] = set()

        async def renew_at(address: str, ids: list[bytes]) -> None:
            request = worker_pb2.RenewLeasesRequest(ticket_ids=ids, lease_ms=int(1000 * lease_s))
            try:
                call = self._stub(address).RenewLeases(request, timeout=CALL_TIMEOUT_S)
                answer = await _answer(call, address)
            except TransferFailed as error:
                log.warning("leases were not renewed: %s", error)
                return
            lost.update(answer.unknown_ticket_ids)
            renewed.update(set(ids) - set(answer.unknown_ticket_ids))

        await asyncio.gather(*(renew_at(*group) for group in _by_address(tickets)))
        return renewed, lost

    async def release(self, tickets: Iterable[tuple[str, bytes]]) -> None:
        """Best effort: a ticket that cannot be released ends with its lease."""

        async def release_at(address: str, ids: list[bytes]) -> None:
            request = worker_pb2.ReleaseTicketsRequest(ticket_ids=ids)
            try:
                call = self._stub(address).ReleaseTickets(request, timeout=CALL_TIMEOUT_S)
                await _answer(call, address)
            except TransferFailed as error:
                log.info("tickets end with their leases: %s", error)

        await asyncio.gather(*(release_at(*group) for group in _by_address(tickets)))

    async def close(self) -> None:
        for incarnation in list(self._known):
            await self._drop(incarnation)
        for channel in self._channels.values():
            await channel.close()

    def _met(self, incarnation: bytes, task: asyncio.Task[worker_pb2.WorkerDescription]) -> None:
        """A meeting that failed is tried again by the next who asks, whoever waited for it."""
        failed = task.cancelled() or task.exception() is not None
        if failed and self._known.get(incarnation) is task:
            del self._known[incarnation]

    async def _introduce(self, incarnation: bytes, address: str) -> worker_pb2.WorkerDescription:
        try:
            peer = await self.describe(address)
            if peer.incarnation != incarnation:
                found = peer.incarnation.hex()
                raise TransferFailed(f"{address} is now {found}, not {incarnation.hex()}")
            check_layouts(self._layout, peer.layout)
            await asyncio.to_thread(
                self._transport.add_peer,
                incarnation,
                peer.transport_info,
                peer.num_blocks,
                peer.block_bytes,
            )
            await asyncio.to_thread(self._transport.warm, incarnation)
            return peer
        except TransferFailed:
            raise
        except Exception as error:
            raise TransferFailed(f"cannot reach {address}: {error}") from error

    async def _drop(self, incarnation: bytes) -> None:
        task = self._known.pop(incarnation, None)
        if task is not None:
            task.cancel()
        try:
            await asyncio.to_thread(self._transport.remove_peer, incarnation)
        except Exception as error:
            log.warning("dropping peer %s: %s", incarnation.hex(), error)

    def _stub(self, address: str) -> worker_pb2_grpc.WorkerStub:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        return worker_pb2_grpc.WorkerStub(self._channels[address])


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


def _by_address(tickets: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, list[bytes]]]:
    groups: dict[str, list[bytes]] = defaultdict(list)
    for address, ticket_id in tickets:
        groups[address].append(ticket_id)
    return groups.items()
