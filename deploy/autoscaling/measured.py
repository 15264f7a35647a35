"""What workers say of themselves, as the autoscaler is told it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from crossdock.deploy.autoscaling.observation import PoolState, StepTimes
from crossdock.proto.v1 import worker_pb2


def pool_state(
    target: int,
    loads: Sequence[worker_pb2.Load],
    starting: int = 0,
    block_size: int = 16,
    started_s: tuple[float, ...] = (),
    serving: int | None = None,
) -> PoolState:
    """Of a pool that is to have `target` workers, from the newest load of each that serves, of
    which there are `serving` where not all have told theirs."""
    rooms = [load.total_blocks * block_size for load in loads if load.total_blocks]
    return PoolState(
        target=target,
        ready=len(loads) if serving is None else serving,
        starting=starting,
        queued_tokens=sum(load.queued_tokens for load in loads),
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads),
        kv_tokens=min(rooms, default=0),
        steps=step_times(loads),
        started_s=started_s,
    )


def step_times(loads: Sequence[worker_pb2.Load]) -> StepTimes:
    """The mean of what was measured of each kind of step."""
    prefill = [
        (load.prefill_base_s, 1 / load.prefill_tokens_per_s, load.prefill_attention_s)
        for load in loads
        if load.prefill_tokens_per_s
    ]
    decode = [
        (load.step_base_s, load.step_per_sequence_s, load.step_context_s)
        for load in loads
        if load.step_base_s or load.step_per_sequence_s
    ]
    return StepTimes(*_mean(prefill), *_mean(decode))


def _mean(lines: Sequence[tuple[float, float, float]]) -> tuple[float, ...]:
    return tuple(map(fmean, zip(*lines))) if lines else (0.0, 0.0, 0.0)
