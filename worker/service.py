"""crossdock.v1.Worker over gRPC: streams of gateways, calls of other workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import TYPE_CHECKING

import grpc

from crossdock.kvtransfer import ticket as tickets
from crossdock.proto.errors import CrossdockError, TransferFailed
from crossdock.proto.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from crossdock.worker.job import Job
from crossdock.worker.loop import Turn
from crossdock.worker.streams import GatewayStream, block_events

if TYPE_CHECKING:
    from crossdock.worker.server import WorkerServer

log = logging.getLogger(__name__)

Pending = dict[str, asyncio.Task[None]]  # a stream's decode requests whose peer is being met


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Turns frames into commands for the engine thread, and its turns into frames."""

    def __init__(self, server: WorkerServer) -> None:
        self._server = server
        self._streams: dict[str, GatewayStream] = {}
        self._stream_ids = count()

    # -- gateway streams -----------------------------------------------------------------------

    async def Connect(
        self,
        frames: AsyncIterator[worker_pb2.GatewayFrame],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[worker_pb2.WorkerFrame]:
        first = await anext(aiter(frames), None)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello: must be the first frame")
            return
        owner = f"{first.hello.gateway}/{next(self._stream_ids)}"
        stream = GatewayStream(owner)
        reader: asyncio.Task[None] | None = None
        try:
            await self._open(stream)
            reader = asyncio.create_task(self._read(frames, stream))
            while (frame := await stream.next_frame()) is not None:
                yield frame
        finally:
            if reader is not None:
                reader.cancel()
            self._streams.pop(owner, None)
            self._server.post(lambda role: role.owner_gone(owner))

    def publish(self, turn: Turn) -> None:
        """Spreads what one engine turn made over the streams. Runs on the asyncio loop."""
        for owner, stream in self._streams.items():
            outputs = turn.outputs.get(owner, [])
            if outputs or turn.events or turn.load:
                frame = worker_pb2.WorkerFrame(outputs=outputs, load=turn.load)
                if turn.events:
                    frame.block_events.CopyFrom(block_events(turn.first_event, turn.events))
                stream.send(frame)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    async def _open(self, stream: GatewayStream) -> None:
        # Snapshot and registration meet on the asyncio loop in the order the engine made them:
        # every later event reaches the stream, and none before.
        opened = asyncio.get_running_loop().create_future()

        def register(frame: worker_pb2.WorkerFrame) -> None:
            if opened.done():
                return  # the gateway went away before its snapshot was there
            self._streams[stream.owner] = stream
            stream.send(frame)
            opened.set_result(None)

        self._server.post_snapshot(register, hello=self._server.description)
        await opened

    async def _read(
        self, frames: AsyncIterator[worker_pb2.GatewayFrame], stream: GatewayStream
    ) -> None:
        pending: Pending = {}
        try:
            async for frame in frames:
                kind = frame.WhichOneof("frame")
                if kind == "prefill":
                    self._submit(frame.prefill.sequence, None, stream.owner)
                elif kind == "decode":
                    sequence_id = frame.decode.sequence.sequence_id
                    met = self._decode(frame.decode, stream.owner)
                    task = asyncio.create_task(met, name=sequence_id)
                    pending[sequence_id] = task
                    task.add_done_callback(lambda done: pending.pop(done.get_name(), None))
                elif kind == "hand_off":
                    self._hand_off(frame.hand_off, stream.owner, pending)
                elif kind == "cancel":
                    self._cancel(frame.cancel, stream.owner, pending)
                elif kind == "resync":
                    self._server.post_snapshot(stream.send)
        finally:
            for task in list(pending.values()):
                task.cancel()
            stream.close()

    def _hand_off(self, progress: worker_pb2.HandOff, owner: str, pending: Pending) -> None:
        if not 0 <= progress.first_token < self._server.vocab_size:
            log.error("%s: no such token: %d", progress.sequence_id, progress.first_token)
            return  # no word of its prompt: the request fails by itself

        def post(_: object = None) -> None:
            self._server.post(lambda role: role.hand_off(progress, owner))

        task = pending.get(progress.sequence_id)
        if task is None:
            post()
        else:  # its request comes first
            task.add_done_callback(post)

    def _cancel(self, request: worker_pb2.CancelRequest, owner: str, pending: Pending) -> None:
        task = pending.get(request.sequence_id)
        if task is not None:
            task.cancel()
        self._server.post(lambda role: role.cancel(request.sequence_id, request.reason, owner))

    async def _decode(self, request: worker_pb2.DecodeRequest, owner: str) -> None:
        if not request.HasField("ticket"):
            self._submit(request.sequence, None, owner)
            return
        try:
            await self._check_ticket(request)
        except CrossdockError as error:
            self._answer(owner, request.sequence, worker_pb2.ERROR_CODE_PULL_FAILED, str(error))
            return
        except Exception as error:
            log.exception("taking %s", request.sequence.sequence_id)
            message = f"{type(error).__name__}: {error}"
            self._answer(owner, request.sequence, worker_pb2.ERROR_CODE_INTERNAL, message)
            return
        self._submit(request.sequence, request, owner)

    async def _check_ticket(self, request: worker_pb2.DecodeRequest) -> None:
        """Raises CrossdockError unless the ticket is this cluster's and its blocks can be read."""
        server, ticket = self._server, request.ticket
        tickets.verify(ticket, server.config.cluster_key)
        peer = await server.peers.ensure(ticket.incarnation, ticket.prefill_address)
        tickets.validate(
            ticket,
            key=server.config.cluster_key,
            incarnation=peer.incarnation,
            layout_hash=server.description.layout_hash,
            num_blocks=peer.num_blocks,
            block_size=server.config.block_size,
        )
        if not 0 < request.sealed_blocks <= len(ticket.block_ids):
            raise TransferFailed(
                f"{request.sealed_blocks} blocks are sealed, the ticket has {len(ticket.block_ids)}"
            )
        # Token 0 comes with the last block.
        covered = len(request.sequence.token_ids)
        covered -= request.sealed_blocks == len(ticket.block_ids)
        if ticket.num_tokens != covered:
            raise TransferFailed(
                f"the ticket covers {ticket.num_tokens} tokens, the request {covered}"
            )

    def _submit(
        self,
        request: worker_pb2.SequenceRequest,
        pull: worker_pb2.DecodeRequest | None,
        owner: str,
    ) -> None:
        """`pull`: the request's ticket and how far it is; None: the prompt is computed here."""
        if owner not in self._streams:
            return  # its stream ended meanwhile, and nobody would free the sequence
        server = self._server
        try:
            job = Job.from_pb(
                request,
                owner,
                arrival=time.time(),
                vocab_size=server.vocab_size,
                context_length=server.description.context_length,
                block_size=server.config.block_size,
            )
        except CrossdockError as error:
            self._answer(owner, request, worker_pb2.ERROR_CODE_INVALID, str(error))
            return
        if pull is not None:
            job.ticket, job.sealed_blocks = pull.ticket, pull.sealed_blocks
            job.checksums = tuple(pull.checksums)
        server.post(lambda role: role.submit(job))

    def _answer(
        self,
        owner: str,
        request: worker_pb2.SequenceRequest,
        code: worker_pb2.ErrorCode,
        message: str,
    ) -> None:
        output = worker_pb2.SequenceOutput(
            sequence_id=request.sequence_id,
            finish_reason=inference_pb2.FINISH_REASON_ERROR,
            error=worker_pb2.SequenceError(code=code, message=message),
        )
        if owner in self._streams:
            self._streams[owner].send(worker_pb2.WorkerFrame(outputs=[output]))

    # -- calls ---------------------------------------------------------------------------------

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerDescription:
        return self._server.description

    async def RenewLeases(
        self, request: worker_pb2.RenewLeasesRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RenewLeasesResponse:
        ids, lease_s = list(request.ticket_ids), request.lease_ms / 1000
        unknown = await self._server.call(lambda role: role.renew_tickets(ids, lease_s))
        return worker_pb2.RenewLeasesResponse(unknown_ticket_ids=unknown)

    async def ReleaseTickets(
        self, request: worker_pb2.ReleaseTicketsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ReleaseTicketsResponse:
        ids = list(request.ticket_ids)
        await self._server.call(lambda role: role.release_tickets(ids))
        return worker_pb2.ReleaseTicketsResponse()

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerStatus:
        return await self._server.status(request.check_integrity)

    async def Probe(
        self, request: worker_pb2.ProbeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ProbeResponse:
        return await self._server.prober.probe(request)
