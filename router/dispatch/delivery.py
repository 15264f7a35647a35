"""From what a worker says to what the client gets: tokens, text, and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from typing import Any

from crossdock.proto.convert import FINISH_FROM_PB, sampling_to_pb
from crossdock.proto.errors import (
    Cancelled,
    CrossdockError,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Overloaded,
    TransferFailed,
)
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import inference_pb2
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.request import Delta, Request
from crossdock.router.dispatch.sequence import SequenceState

# Causes for which a sequence is prefilled again elsewhere, prompt and delivered tokens, and its
# stream goes on. Any other error of a worker ends the request.
RESTARTED = {
    pb.ERROR_CODE_PREEMPTED: "preempted",
    pb.ERROR_CODE_OVERLOADED: "overloaded",
    pb.ERROR_CODE_DRAINING: "draining",
    pb.ERROR_CODE_PULL_FAILED: "pull failed",
    pb.ERROR_CODE_DEVICE: "device failed",
}


def detokenize(sequence: SequenceState, output: pb.SequenceOutput, eos: Set[int]) -> Delta:
    """An output as far as the client gets it. The token that ends a sequence is counted but has no
    text; what follows a stop string is dropped. Raises where the worker gave the sequence up."""
    reason = FINISH_FROM_PB.get(output.finish_reason) if output.finish_reason else None
    if reason is FinishReason.CANCELLED:
        raise Cancelled("the worker cancelled the sequence")
    if reason is FinishReason.ERROR:
        raise CrossdockError("the worker failed the sequence without saying why")
    delta = Delta(
        sequence.index,
        "",
        list(output.token_ids),
        list(output.logprobs),
        reason,
        output.stop_reason,
    )
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


def _ends(sequence: SequenceState, token_id: int, eos: Set[int]) -> bool:
    sampling = sequence.sampling
    return token_id in sampling.stop_token_ids or (token_id in eos and not sampling.ignore_eos)


def sampling_message(request: Request, continuation: int) -> inference_pb2.SamplingParams:
    """What workers are told. Stop strings stay at the gateway: workers know no text."""
    seed = (request.sampling.seed + continuation) % 2**64
    return sampling_to_pb(dataclasses.replace(request.sampling, seed=seed, stop=()))


def failure_of(worker: str, error: pb.SequenceError) -> CrossdockError:
    """A worker's error as the client gets it."""
    message = f"worker {worker}: {error.message or pb.ErrorCode.Name(error.code)}"
    again = f"{message}; send the request again"
    kinds: dict[Any, Callable[[], CrossdockError]] = {
        pb.ERROR_CODE_INVALID: lambda: InvalidRequest("request", worker, error.message),
        pb.ERROR_CODE_OVERLOADED: lambda: Overloaded(again),
        pb.ERROR_CODE_PULL_FAILED: lambda: TransferFailed(again),
        pb.ERROR_CODE_PREEMPTED: lambda: Overloaded(again),
        pb.ERROR_CODE_DEADLINE: lambda: DeadlineExceeded(message),
        pb.ERROR_CODE_CANCELLED: lambda: Cancelled(message),
        pb.ERROR_CODE_DRAINING: lambda: Draining(again),
    }
    return kinds.get(error.code, lambda: CrossdockError(message))()
