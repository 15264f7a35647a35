"""What becomes of a sequence whose worker failed it: it goes on elsewhere, or its request fails."""

from __future__ import annotations

from typing import Any

from crossdock.proto import errors
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.admission import Limits
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


def restart_delay_s(
    sequence: SequenceState, cause: str, failure: errors.CrossdockError, limits: Limits
) -> float:
    """Counts a restart; returns after how many seconds it may begin. Raises `failure` where it is
    one too many since the last token."""
    sequence.restarts += 1
    if sequence.restarts > limits.max_restarts:
        raise failure
    if sequence.restarts == 1 and cause != "overloaded":
        return 0.0
    return limits.first_backoff_s * 2.0 ** (sequence.restarts - 1)


def count_loss(sequence: SequenceState, error: errors.CrossdockError, limits: Limits) -> None:
    """Raises `error` where it is one loss too many: the sequence itself may be what does it."""
    sequence.losses += 1
    if sequence.losses > limits.max_losses:
        raise error


_FAILURES: dict[Any, type[errors.CrossdockError]] = {
    pb.ERROR_CODE_OVERLOADED: errors.Overloaded,
    pb.ERROR_CODE_PULL_FAILED: errors.TransferFailed,
    pb.ERROR_CODE_PREEMPTED: errors.Overloaded,
    pb.ERROR_CODE_DEADLINE: errors.DeadlineExceeded,
    pb.ERROR_CODE_DRAINING: errors.Draining,
    pb.ERROR_CODE_NOT_FINITE: errors.NotFinite,
    pb.ERROR_CODE_GRAMMAR: errors.GrammarFailed,
}


def failure_of(worker: str, error: pb.SequenceError) -> errors.CrossdockError:
    """A worker's error as the client gets it."""
    if error.code == pb.ERROR_CODE_INVALID:
        return errors.InvalidRequest("request", worker, error.message)
    message = f"worker {worker}: {error.message or pb.ErrorCode.Name(error.code)}"
    kind = _FAILURES.get(error.code, errors.CrossdockError)
    return kind(f"{message}; send the request again" if kind.retriable else message)
