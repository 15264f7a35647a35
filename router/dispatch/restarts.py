"""What becomes of a sequence whose worker failed it: it goes on elsewhere, or its request fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crossdock.proto.errors import (
    Cancelled,
    CrossdockError,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Overloaded,
    TransferFailed,
)
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
    sequence: SequenceState, cause: str, failure: CrossdockError, limits: Limits
) -> float:
    """Counts a restart; returns after how many seconds it may begin. Raises `failure` where it is
    one too many since the last token."""
    sequence.restarts += 1
    if sequence.restarts > limits.max_restarts:
        raise failure
    if sequence.restarts == 1 and cause != "overloaded":
        return 0.0
    return limits.first_backoff_s * 2.0 ** (sequence.restarts - 1)


def count_loss(sequence: SequenceState, error: CrossdockError, limits: Limits) -> None:
    """Raises `error` where it is one loss too many: the sequence itself may be what does it."""
    sequence.losses += 1
    if sequence.losses > limits.max_losses:
        raise error


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
