"""What gateways ask of this worker, and what each hears of it. Frames in, frames out: service.py
carries them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from crossdock.kvtransfer import ticket as tickets
from crossdock.proto.errors import CrossdockError, Draining, TransferFailed
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.config import WorkerConfig
from crossdock.worker.job import Job
from crossdock.worker.loop import Turn
from crossdock.worker.outbox import error_output
from crossdock.worker.peers import Met, Peers
from crossdock.worker.role import WorkerRole
from crossdock.worker.streams import GatewayStream, block_events

log = logging.getLogger(__name__)


class Host(Protocol):
    """What Gateways asks of the worker whose they are."""

    config: WorkerConfig
    hasher: BlockHasher
    description: pb.WorkerDescription
    vocab_size: int
    peers: Peers

    @property
    def public_description(self) -> pb.WorkerDescription:
        """Without the key to the pool."""

    def post(self, command: Callable[[WorkerRole], None]) -> None:
        """Has the command run on the engine's thread, between two steps."""

    def post_snapshot(
        self,
        deliver: Callable[[pb.WorkerFrame], None],
        hello: pb.WorkerDescription | None = None,
    ) -> None:
        """Has `deliver` called with the prefix cache and the load, in order with `publish`."""


@dataclass(eq=False)
class Gateways:
    """Owns the streams of all gateways. What a gateway has here ends with its stream."""

    host: Host
    clock: Callable[[], float] = time.time
    _streams: dict[str, GatewayStream] = field(default_factory=dict)
    _ids: Iterator[int] = field(default_factory=count)
    _next_event: int = 0  # number of the block event after those that were spread
    # Prompts being computed that other gateways were told of, by sequence id: their owners.
    _told: dict[str, str] = field(default_factory=dict)

    def open(self, gateway: str, wake: Callable[[], None]) -> GatewayStream:
        """A gateway has connected: its stream begins with a snapshot, and then misses nothing."""
        stream = GatewayStream(f"{gateway}/{next(self._ids)}", wake)
        self._streams[stream.owner] = stream

        def begin(frame: pb.WorkerFrame) -> None:
            stream.has_snapshot = True
            stream.send(frame)

        self.host.post_snapshot(begin, hello=self.host.public_description)
        return stream

    def receive(self, stream: GatewayStream, frame: pb.GatewayFrame) -> None:
        """Takes a frame of a gateway; whatever it asks for is answered over the stream."""
        kind = frame.WhichOneof("frame")
        if stream.deaf:
            if kind in ("prefill", "decode"):
                asked = frame.prefill if kind == "prefill" else frame.decode
                error = Draining(f"{self.host.config.name} takes another role")
                _refuse(stream, asked.sequence, pb.ERROR_CODE_DRAINING, error)
        elif kind == "prefill":
            self._submit(frame.prefill.sequence, stream)
        elif kind == "decode":
            self._decode(frame.decode, stream)
        elif kind == "hand_off":
            self._hand_off(frame.hand_off, stream)
        elif kind == "cancel":
            cancel = frame.cancel
            stream.meetings.pop(cancel.sequence_id, None)
            self._computed([cancel.sequence_id])
            self.host.post(
                lambda role: role.cancel(cancel.sequence_id, cancel.reason, stream.owner)
            )
        elif kind == "resync":
            self.host.post_snapshot(stream.send)

    def ended(self, stream: GatewayStream) -> None:
        """The gateway is gone, or its stream broke: frees all that it had here."""
        stream.meetings.clear()
        self._streams.pop(stream.owner, None)
        self._computed([key for key, owner in self._told.items() if owner == stream.owner])
        self.host.post(lambda role: role.owner_gone(stream.owner))

    def publish(self, turn: Turn) -> None:
        """Spreads what one engine turn made over the streams."""
        events = None
        if turn.events:
            events = block_events(turn.first_event, turn.events)
            self._next_event = turn.first_event + len(turn.events)
        elif not turn:  # a heartbeat, by which a gateway that lost the last events notices it
            events = block_events(self._next_event, [])
        if self._told:
            self._computed(_begun(turn))
        for owner, stream in self._streams.items():
            outputs = turn.outputs.get(owner, [])
            if stream.has_snapshot and (outputs or events or turn.load):
                stream.send(pb.WorkerFrame(outputs=outputs, load=turn.load, block_events=events))

    def deafen(self) -> list[GatewayStream]:
        """The streams of today take no new work any more; whoever has them closed returns later
        over new ones."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.deaf = True
            stream.meetings.clear()
        return streams

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _hand_off(self, hand_off: pb.HandOff, stream: GatewayStream) -> None:
        if not all(0 <= token < self.host.vocab_size for token in hand_off.first_tokens):
            log.error("%s: no such tokens: %s", hand_off.sequence_id, hand_off.first_tokens)
            return  # without it the request fails by itself
        waiting = stream.meetings.get(hand_off.sequence_id)
        if waiting is None:
            self.host.post(lambda role: role.hand_off(hand_off, stream.owner))
        else:
            waiting.append(hand_off)  # its request comes first

    def _decode(self, request: pb.DecodeRequest, stream: GatewayStream) -> None:
        ticket, sequence = request.progress.ticket, request.sequence
        if not request.HasField("progress"):
            self._submit(sequence, stream)
            return
        try:
            tickets.verify(ticket, self.host.config.cluster_key)
        except CrossdockError as error:
            _refuse(stream, sequence, pb.ERROR_CODE_PULL_FAILED, error)
            return
        waiting: list[pb.HandOff] = []
        stream.meetings[sequence.sequence_id] = waiting
        then = partial(self._met, request, stream, waiting)
        self.host.peers.ensure(ticket.incarnation, ticket.prefill_address, then)

    def _met(
        self,
        request: pb.DecodeRequest,
        stream: GatewayStream,
        waiting: list[pb.HandOff],
        met: Met,
    ) -> None:
        sequence = request.sequence
        if stream.meetings.get(sequence.sequence_id) is not waiting:
            return  # cancelled meanwhile, or its stream ended
        del stream.meetings[sequence.sequence_id]
        job = self._job(sequence, stream)  # its tokens can be hashed, which the ticket's check does
        if job is None:
            return
        try:
            self._check_ticket(request, met)
        except CrossdockError as error:
            _refuse(stream, sequence, pb.ERROR_CODE_PULL_FAILED, error)
            return
        job.progress = request.progress
        self.host.post(lambda role: role.submit(job))
        for hand_off in waiting:
            self._hand_off(hand_off, stream)

    def _check_ticket(self, request: pb.DecodeRequest, met: Met) -> None:
        """Raises CrossdockError unless the ticket is this cluster's and its blocks can be read."""
        if isinstance(met, TransferFailed):
            raise met
        host, progress, sequence = self.host, request.progress, request.sequence
        ticket = progress.ticket
        tickets.validate(
            ticket,
            key=host.config.cluster_key,
            incarnation=met.incarnation,
            layout_hash=host.description.layout_hash,
            prompt_hash=host.hasher.prompt(
                sequence.token_ids[: ticket.num_tokens], sequence.block_hashes, sequence.root_hash
            ),
            num_blocks=met.num_blocks,
            block_size=host.config.block_size,
        )
        if not 0 < progress.ready_blocks <= len(ticket.block_ids):
            raise TransferFailed(
                f"{progress.ready_blocks} blocks are ready, the ticket has {len(ticket.block_ids)}"
            )
        # Token 0, and what was drawn with it, comes with the last block.
        beyond = len(sequence.token_ids) - ticket.num_tokens
        complete = progress.ready_blocks == len(ticket.block_ids)
        if beyond < 0 or complete != (beyond > 0):
            raise TransferFailed(
                f"the ticket covers {ticket.num_tokens} tokens, the request has {beyond} more"
            )

    def _submit(self, request: pb.SequenceRequest, stream: GatewayStream) -> None:
        """The prompt is computed here."""
        job = self._job(request, stream)
        if job is not None:
            self._tell_others(request, stream)
            self.host.post(lambda role: role.submit(job))

    def _tell_others(self, request: pb.SequenceRequest, stream: GatewayStream) -> None:
        """So that they do not send theirs here as well before a load counts this one."""
        if len(self._streams) < 2:
            return
        placed = pb.PlacedPrompt(
            sequence_id=request.sequence_id,
            num_tokens=len(request.token_ids),
            uncached_tokens=request.uncached_tokens,
            yields=request.yields,
        )
        self._told[request.sequence_id] = stream.owner
        self._to_others(stream.owner, pb.WorkerFrame(placed=[placed]))

    def _computed(self, sequence_ids: Iterable[str]) -> None:
        """These have their token 0, or are gone: nothing where others were not told of them."""
        for sequence_id in sequence_ids:
            owner = self._told.pop(sequence_id, None)
            if owner is not None:
                self._to_others(owner, pb.WorkerFrame(computed=[sequence_id]))

    def _to_others(self, owner: str, frame: pb.WorkerFrame) -> None:
        for stream in self._streams.values():
            if stream.owner != owner and stream.has_snapshot:
                own = pb.WorkerFrame()  # what follows may be merged into it
                own.CopyFrom(frame)
                stream.send(own)

    def _job(self, request: pb.SequenceRequest, stream: GatewayStream) -> Job | None:
        """None: it was refused."""
        host = self.host
        try:
            return Job.from_pb(
                request,
                stream.owner,
                arrival=self.clock(),
                vocab_size=host.vocab_size,
                context_length=host.description.context_length,
                hasher=host.hasher,
            )
        except CrossdockError as error:
            _refuse(stream, request, pb.ERROR_CODE_INVALID, error)
            return None


def _begun(turn: Turn) -> list[str]:
    """The sequences that gained tokens, or ended, and are named."""
    return [
        output.sequence_id
        for outputs in turn.outputs.values()
        for output in outputs
        if output.sequence_id and (output.token_ids or output.finish_reason)
    ]


def _refuse(
    stream: GatewayStream,
    request: pb.SequenceRequest,
    code: pb.ErrorCode,
    error: CrossdockError,
) -> None:
    output = error_output(request.sequence_id, code, str(error))
    stream.send(pb.WorkerFrame(outputs=[output]))
