"""From what a worker says to what the client gets: tokens, text, and errors."""

from __future__ import annotations

from collections.abc import Collection

from crossdock.proto.convert import FINISH_FROM_PB
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.request import Delta
from crossdock.router.dispatch.sequence import SequenceState


def detokenize(sequence: SequenceState, output: pb.SequenceOutput, eos: Collection[int]) -> Delta:
    """An output as far as the client gets it. The token that ends a sequence is counted but has no
    text; what follows a stop string is dropped."""
    reason = FINISH_FROM_PB.get(output.finish_reason) if output.finish_reason else None
    ids, logprobs = list(output.token_ids), list(output.logprobs)
    delta = Delta(sequence.index, "", ids, logprobs, reason, output.stop_reason)
    visible = delta.token_ids
    if reason is FinishReason.STOP and visible and _ends(sequence, visible[-1], eos):
        visible = visible[:-1]
    if visible:
        piece = sequence.detokenizer.push(visible)
        delta.text = piece.text
        if piece.stopped is not None:
            delta.cut_short = reason is None or piece.token_count < len(delta.token_ids)
            delta.token_ids = delta.token_ids[: piece.token_count]
            delta.logprobs = delta.logprobs[: piece.token_count]
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, piece.stopped
            return delta
    if reason is not None:
        delta.text += sequence.detokenizer.finish()
    return delta


def _ends(sequence: SequenceState, token_id: int, eos: Collection[int]) -> bool:
    sampling = sequence.sampling
    return token_id in sampling.stop_token_ids or (token_id in eos and not sampling.ignore_eos)
