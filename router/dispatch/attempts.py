"""One attempt at a sequence, on the workers it was placed on: sent, cancelled, forgotten."""

from __future__ import annotations

from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.links import WorkerLink
from crossdock.router.dispatch.sequence import Phase, SequenceState
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.view import ClusterView


def send(
    sequence: SequenceState,
    link: WorkerLink,
    view: ClusterView,
    demand: Demand,
    eos: list[int],
    now: float,
) -> None:
    """Sends it to the first worker of its placement; the view counts its `demand` on both."""
    placement, sequence_id = sequence.placement, sequence.sequence_id
    tokens, blocks, context = placement.uncached_tokens, demand.blocks, demand.num_tokens
    cached = context - tokens
    message = sequence.request_message(eos)
    message.uncached_tokens = placement.uncached_tokens
    if placement.prefill is None:
        sequence.phase = Phase.DECODE
        sequence.decode_worker = sequence.prefill_worker = placement.decode
        view.place(placement.decode, sequence_id, tokens, blocks, cached, context)
        link.send(pb.GatewayFrame(decode=pb.DecodeRequest(sequence=message)))
    else:
        sequence.phase = Phase.PREFILL
        sequence.prefill_worker = placement.prefill
        view.place(placement.prefill, sequence_id, tokens, blocks, cached)
        if sequence.sampling.max_tokens:
            view.place(placement.decode, sequence_id, 0, blocks, context=context)
        prefill = pb.PrefillRequest(sequence=message, decode_worker=placement.decode)
        link.send(pb.GatewayFrame(prefill=prefill))
    view.sent(link.name, sequence_id, now)


def cancel(sequence: SequenceState, why: str) -> None:
    """Has every worker that holds something of it drop that."""
    request = pb.CancelRequest(sequence_id=sequence.sequence_id, reason=why)
    for link in sequence.holders.values():
        link.send(pb.GatewayFrame(cancel=request))


def forget(sequence: SequenceState, view: ClusterView) -> None:
    """What workers still say of it is ignored, and the view has it nowhere."""
    for name in list(sequence.holders):
        sequence.release(name)
    placed = sequence.placement.prefill, sequence.placement.decode
    for worker in {*placed, sequence.decode_worker}:
        if worker:
            view.unplace(worker, sequence.sequence_id)
