"""The gateway's part in a hand-off: what decode workers are told of prompts computed elsewhere.

    nothing ──some blocks are ready──> reserved early ──all ready, token 0──> decodes
       └───────────────────────── all ready, token 0 ───────────────────────────^

A decode worker lost after an early reservation costs nothing: the ticket is good for any other.
One whose stream broke may not know it yet, so it gets the same sequence only under another id.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from crossdock.proto.errors import CrossdockError, WorkerLost
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.links import Links, WorkerLink
from crossdock.router.dispatch.sequence import Phase, SequenceState
from crossdock.router.placement.demand import NoWorker
from crossdock.router.placement.latency import decode_for
from crossdock.router.placement.view import ClusterView


@dataclass(frozen=True)
class HandOffs:
    """Keeps nothing of its own: where a hand-off stands is in its SequenceState."""

    _view: ClusterView
    _links: Links
    _hasher: BlockHasher
    _eos: list[int]
    _rng: random.Random

    def advance(self, sequence: SequenceState, now: float) -> None:
        """Part of the prompt is computed: its decode worker, where it is there, reserves early."""
        if sequence.decode_worker:
            self._send(sequence)
            return
        link = self._taking(sequence.placement.decode)
        if link is not None:
            self._tell(sequence, link, now)

    def complete(self, sequence: SequenceState, now: float) -> None:
        """Token 0 is delivered: the decode worker may fence and go on. Raises NoWorker, or
        WorkerLost where the only one left may still have the sequence."""
        if not sequence.progress.HasField("ticket"):
            raise CrossdockError(f"{sequence.prefill_worker} gave token 0 without a ticket")
        sequence.phase = Phase.HAND_OFF
        self._hasher.extend(sequence.hashes, sequence.token_ids, sequence.root_hash)
        if sequence.decode_worker:
            self._send(sequence)
        else:
            self._tell(sequence, self._choose(sequence, now), now)
        sequence.phase = Phase.DECODE

    def drop(self, sequence: SequenceState, lost: bool) -> None:
        """The decode worker that reserved early is lost, or has given the sequence back."""
        name = sequence.decode_worker
        if lost:
            sequence.lost_early.add(name)
        sequence.release(name)
        sequence.avoid.add(name)
        self._view.unplace(name, sequence.sequence_id)
        sequence.decode_worker = ""
        sequence.placement = replace(sequence.placement, decode="")

    def _choose(self, sequence: SequenceState, now: float) -> WorkerLink:
        """The decode worker of the placement, or any other where that was lost or drains."""
        link = self._taking(sequence.placement.decode)
        if link is None:
            self._view.unplace(sequence.placement.decode, sequence.sequence_id)
            tenant, most = sequence.active.request.tenant, sequence.sampling.max_tokens
            output = self._view.lengths.expected(
                tenant, sequence.prompt_tokens, most, sequence.generated
            )
            demand = sequence.demand(self._hasher.block_size, output=output)
            name = decode_for(self._view, demand, sequence.prefill_worker, now, self._rng)
            link = self._taking(name)
            if link is None:
                raise NoWorker("no decode worker is ready")
            if name in sequence.lost_early:
                raise WorkerLost(f"{name}, lost before token 0, is the only decode worker")
            context = demand.num_tokens
            self._view.place(name, sequence.sequence_id, 0, demand.blocks, context=context)
        return link

    def _taking(self, name: str) -> WorkerLink | None:
        """The open link to a worker, where it takes new work."""
        worker = self._view.workers.get(name)
        return None if worker is None or worker.load.draining else self._links.get(name)

    def _tell(self, sequence: SequenceState, link: WorkerLink, now: float) -> None:
        sequence.decode_worker = link.name
        sequence.hold(link)
        message = sequence.request_message(self._eos, handed_off=True)
        decode = pb.DecodeRequest(sequence=message, progress=sequence.progress)
        link.send(pb.GatewayFrame(decode=decode))
        self._view.sent(link.name, sequence.sequence_id, now)

    def _send(self, sequence: SequenceState) -> None:
        hand_off = pb.HandOff(sequence_id=sequence.sequence_id, progress=sequence.progress)
        hand_off.progress.ClearField("ticket")  # which it has
        if sequence.phase is Phase.HAND_OFF:
            hand_off.first_tokens.extend(sequence.token_ids[sequence.progress.ticket.num_tokens :])
        sequence.holders[sequence.decode_worker].send(pb.GatewayFrame(hand_off=hand_off))
