"""The gateway's part in a hand-off: what decode workers are told of prompts computed elsewhere.

    nothing ──some blocks are sealed──> reads along ──all sealed, token 0──> decodes
       └───────────────────────── all sealed, token 0 ──────────────────────────^

A decode worker that falls out while it reads along costs nothing: the ticket is good for any other.
One whose stream broke may not know it yet, so it gets the same sequence only under another id.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from crossdock.proto.errors import CrossdockError, WorkerLost
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.flight import Flight, Phase
from crossdock.router.links import WorkerLink
from crossdock.router.policy import NoWorker, decode_for
from crossdock.router.view import ClusterView


class HandOffs:
    """Keeps nothing of its own: where a hand-off stands is in its Flight."""

    def __init__(
        self,
        view: ClusterView,
        link_of: Callable[[str], WorkerLink | None],
        block_size: int,
        eos: list[int],
        rng: random.Random,
    ) -> None:
        self._view = view
        self._link_of = link_of
        self._block_size = block_size
        self._eos = eos
        self._rng = rng

    def note(self, flight: Flight, output: pb.SequenceOutput) -> None:
        """What a prefill worker says of its blocks."""
        if output.HasField("ticket"):
            flight.ticket = output.ticket
        flight.sealed_blocks = output.sealed_blocks
        flight.checksums = list(output.checksums)

    def advance(self, flight: Flight, now: float) -> None:
        """Part of the prompt is computed: its decode worker, where it is there, reads along."""
        assert flight.placement is not None
        if flight.decode_worker:
            self._send(flight)
            return
        link = self._taking(flight.placement.decode)
        if link is not None:
            self._tell(flight, link, now)

    def complete(self, flight: Flight, now: float) -> None:
        """Token 0 is delivered: the decode worker may fence and go on.

        Raises NoWorker, or WorkerLost where the only one left may still have the sequence.
        """
        if flight.ticket is None:
            raise CrossdockError(f"{flight.prefill_worker} gave token 0 without a ticket")
        flight.phase = Phase.HAND_OFF
        flight.extend_hashes(self._block_size)
        if flight.decode_worker:
            self._send(flight)
        else:
            self._tell(flight, self._choose(flight, now), now)
        flight.phase = Phase.DECODE

    def drop(self, flight: Flight, lost: bool) -> None:
        """The decode worker that reads along is lost, or has given the sequence back."""
        assert flight.placement is not None
        name = flight.decode_worker
        if lost:
            flight.lost_readers.add(name)
        flight.let_go(name)
        flight.avoid.add(name)
        self._view.unplace(name, flight.sequence_id)
        flight.decode_worker = ""
        flight.placement = replace(flight.placement, decode="")

    def _choose(self, flight: Flight, now: float) -> WorkerLink:
        """The decode worker of the placement, or any other where that was lost or drains."""
        assert flight.placement is not None
        link = self._taking(flight.placement.decode)
        if link is None:
            self._view.unplace(flight.placement.decode, flight.sequence_id)
            demand = flight.demand(self._block_size)
            name = decode_for(self._view, demand, flight.prefill_worker, now, self._rng)
            link = self._taking(name)
            if link is None:
                raise NoWorker("no decode worker is ready")
            if name in flight.lost_readers:
                raise WorkerLost(f"{name}, lost while it read along, is the only decode worker")
            self._view.place(name, flight.sequence_id, 0, demand.blocks)
        return link

    def _taking(self, name: str) -> WorkerLink | None:
        """The open link to a worker, where it takes new work."""
        worker = self._view.workers.get(name)
        return None if worker is None or worker.load.draining else self._link_of(name)

    def _tell(self, flight: Flight, link: WorkerLink, now: float) -> None:
        flight.decode_worker = link.name
        flight.hold(link)
        decode = pb.DecodeRequest(
            sequence=flight.request_message(self._eos),
            ticket=flight.ticket,
            sealed_blocks=flight.sealed_blocks,
            checksums=flight.checksums,
        )
        link.send(pb.GatewayFrame(decode=decode))
        self._view.sent(link.name, flight.sequence_id, now)

    def _send(self, flight: Flight) -> None:
        hand_off = pb.HandOff(
            sequence_id=flight.sequence_id,
            sealed_blocks=flight.sealed_blocks,
            checksums=flight.checksums,
        )
        if flight.phase is Phase.HAND_OFF:
            hand_off.first_token = flight.token_ids[-1]
        flight.holders[flight.decode_worker].send(pb.GatewayFrame(hand_off=hand_off))
