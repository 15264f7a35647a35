"""`best_of`: more continuations are made than answered; the most probable are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import MAX_N, SamplingParams
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.request import Delta


def made_of(best_of: int | None, n: int, sampling: SamplingParams, stream: bool) -> int:
    """How many continuations of each prompt are to be made. Raises InvalidRequest."""
    if best_of is None:
        return n
    if not n <= best_of <= MAX_N:
        raise InvalidRequest("best_of", best_of, f"must be from n = {n} to {MAX_N}")
    if best_of == n:
        return n
    if stream:
        raise InvalidRequest("best_of", best_of, "cannot be streamed where it is more than n")
    if sampling.greedy or not sampling.max_tokens:
        why = "temperature is 0" if sampling.greedy else "max_tokens is 0"
        raise InvalidRequest("best_of", best_of, f"must be n where {why}: all would be equal")
    return best_of


def ranked(sampling: SamplingParams) -> SamplingParams:
    """With what the choice needs to know of each token."""
    return replace(sampling, logprobs=sampling.logprobs or 0)


def best(deltas: Sequence[Delta], n: int, made: int) -> list[Delta]:
    """The n of each prompt's continuations, `made` whole ones in order, whose tokens have the
    highest mean log-probability, the best first. The usage of the first is that of them all."""
    chosen: list[Delta] = []
    for start in range(0, len(deltas), made):
        group = deltas[start : start + made]
        usages = [delta.usage or inference_pb2.Usage() for delta in group]
        total = sum(usage.completion_tokens for usage in usages)
        first = len(chosen)
        for delta in sorted(group, key=_mean, reverse=True)[:n]:  # of equal ones the earlier
            delta.index, delta.usage = len(chosen), inference_pb2.Usage()
            chosen.append(delta)
        chosen[first].usage = inference_pb2.Usage(
            prompt_tokens=usages[0].prompt_tokens,
            completion_tokens=total,
            cached_tokens=usages[0].cached_tokens,
        )
    return chosen


def _mean(delta: Delta) -> float:
    values = [item.chosen.logprob for item in delta.logprobs]
    return sum(values) / len(values) if values else 0.0
