"""crossdock.v1.Worker over gRPC: streams of gateways, calls of other workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from crossdock.proto.identity import CONTROLLER, GATEWAY, OPERATOR, Peer, admit
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.worker.gateways import Gateways
from crossdock.worker.streams import GatewayStream

if TYPE_CHECKING:
    from crossdock.worker.server import WorkerServer

WORKERS = (Role.PREFILL, Role.DECODE, Role.COLOCATED)
CALLERS = {
    "Connect": (GATEWAY,),
    "Describe": (Role.DECODE,),  # who reads this pool: it tells how to
    "RenewLeases": (Role.DECODE,),
    "ReleaseTickets": (Role.DECODE,),
    "GetStatus": (CONTROLLER, OPERATOR),
    "Probe": (CONTROLLER, OPERATOR),
    "StoreState": (GATEWAY, *WORKERS),  # those that drain
    "FetchState": (GATEWAY,),
    "DropState": (GATEWAY, *WORKERS),
}


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Carries frames between gateways and `Gateways`, and calls to the engine thread. Who may make
    a call stands in CALLERS."""

    def __init__(self, server: WorkerServer, gateways: Gateways) -> None:
        self._server = server
        self._gateways = gateways

    async def Connect(
        self,
        frames: AsyncIterator[pb.GatewayFrame],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.WorkerFrame]:
        """One gateway's stream: hello, then frames both ways. Its end frees all it had here. Who
        the gateway is, its certificate says; the hello may say nothing else."""
        peer = await self._admit("Connect", context)
        first = await anext(aiter(frames), None)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello: must be the first frame")
            return
        told = (first.hello.gateway, first.hello.incarnation.hex())
        if peer is not None and told != (peer.name, peer.incarnation):
            why = f"hello: {peer} of incarnation {peer.incarnation} says that it is another"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
        ready = asyncio.Event()
        stream = self._gateways.open(first.hello.gateway, ready.set)
        reader = asyncio.create_task(self._read(frames, stream))
        try:
            while not stream.closed:
                await ready.wait()
                ready.clear()
                while (frame := stream.take()) is not None:
                    yield frame
        finally:
            reader.cancel()
            self._gateways.ended(stream)

    async def _read(self, frames: AsyncIterator[pb.GatewayFrame], stream: GatewayStream) -> None:
        try:
            async for frame in frames:
                for each in (frame, *frame.more):
                    self._gateways.receive(stream, each)
        finally:
            stream.close()

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> pb.WorkerDescription:
        """Layout, incarnation and transport info: what a peer needs to read this pool."""
        await self._admit("Describe", context)
        return self._server.description

    async def RenewLeases(
        self, request: pb.RenewLeasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.RenewLeasesResponse:
        """Extends leases by `lease_ms`; answers with the ids that are not open here."""
        await self._admit("RenewLeases", context)
        ids, lease_s = list(request.ticket_ids), request.lease_ms / 1000
        unknown = await self._server.call(lambda role: role.renew_tickets(ids, lease_s))
        return pb.RenewLeasesResponse(unknown_ticket_ids=unknown)

    async def ReleaseTickets(
        self, request: pb.ReleaseTicketsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseTicketsResponse:
        """For tickets that no fence has released; ids that are not open are ignored."""
        await self._admit("ReleaseTickets", context)
        ids = list(request.ticket_ids)
        await self._server.call(lambda role: role.release_tickets(ids))
        return pb.ReleaseTicketsResponse()

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.WorkerStatus:
        await self._admit("GetStatus", context)
        return await self._server.status(request.check_integrity)

    async def Probe(
        self, request: pb.ProbeRequest, context: grpc.aio.ServicerContext
    ) -> pb.ProbeResponse:
        await self._admit("Probe", context)
        return await self._server.prober.probe(request)

    async def StoreState(
        self, request: pb.StoreStateRequest, context: grpc.aio.ServicerContext
    ) -> pb.StoreStateResponse:
        """Keeps what a gateway wants to find again, whichever gateway it is then."""
        await self._admit("StoreState", context)
        return self._server.kept.store(request)

    async def FetchState(
        self, request: pb.FetchStateRequest, context: grpc.aio.ServicerContext
    ) -> pb.FetchStateResponse:
        """What was stored under this id for this tenant, where it is still here."""
        await self._admit("FetchState", context)
        return self._server.kept.fetch(request)

    async def DropState(
        self, request: pb.DropStateRequest, context: grpc.aio.ServicerContext
    ) -> pb.DropStateResponse:
        """Forgets it before its time."""
        await self._admit("DropState", context)
        return self._server.kept.drop(request)

    async def _admit(self, call: str, context: grpc.aio.ServicerContext) -> Peer | None:
        return await admit(context, self._server.credentials, *CALLERS[call])
