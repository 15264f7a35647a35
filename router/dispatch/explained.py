"""What is kept of a request, put into words for who asks why it went where it did."""

from __future__ import annotations

from collections.abc import Iterable

from crossdock.proto.v1 import admin_pb2 as pb
from crossdock.router.dispatch.recent import Course, Trail
from crossdock.router.dispatch.sequence import Attempt
from crossdock.router.placement.demand import Placement
from crossdock.router.placement.weighed import ByNumber, Candidate, Parts


def explained(trail: Trail, now: float) -> pb.ExplainedRequest:
    """A request as it stands `now`, on the gateway's clock."""
    active = trail.active
    courses = trail.courses if active is None else [Course.of(each) for each in active.sequences]
    return pb.ExplainedRequest(
        request_id=trail.request_id,
        model=trail.model,
        received_unix_s=trail.received_unix,
        seconds=(trail.ended if active is None else now) - trail.received,
        running=active is not None,
        error=trail.error,
        sequences=[_sequence(course) for course in courses],
    )


def summary(placement: Placement) -> str:
    """A decision in one line, as spans have it: why, where, and its seconds by part."""
    where = " + ".join(name for name in (placement.prefill, placement.decode) if name)
    told = [f"{placement.reason}: {where}"]
    if placement.weighed is not None:
        parts = placement.weighed.parts(placement)
        told += [f"{name}={seconds:.4g}" for name, seconds in parts._asdict().items()]
        weighed = len(placement.weighed.computing()), len(placement.weighed.decoding())
        told.append("of={}+{}".format(*weighed))
    return " ".join(told)


def _sequence(course: Course) -> pb.ExplainedSequence:
    timeline, generated = course.timeline, course.generated
    first, last = timeline.first_token, timeline.last_token
    tpot_s = 0.0
    if first is not None and last is not None and generated > 1:
        tpot_s = (last - first) / (generated - 1)
    stages = [pb.Stage(name=name, seconds=s) for name, s in timeline.stages().items()]
    return pb.ExplainedSequence(
        index=course.index,
        prompt_tokens=course.prompt_tokens,
        cached_tokens=course.cached_tokens,
        generated_tokens=generated,
        finish_reason=course.finish_reason or "",
        placements=[_placement(each, course) for each in course.attempts],
        timings=course.timings,
        stages=stages,
        transfer_s=course.transfer.seconds,
        tpot_s=tpot_s,
    )


def _placement(attempt: Attempt, course: Course) -> pb.ExplainedPlacement:
    placement, weighed = attempt.placement, attempt.placement.weighed
    newest = attempt is course.attempts[-1]
    told = pb.ExplainedPlacement(
        at_s=attempt.at,
        sequence_id=attempt.sequence_id,
        reason=placement.reason or "",
        prefill=placement.prefill or "",
        decode=placement.decode,
        decoded_on=course.decode_worker if newest else attempt.decode_worker,
        cached_blocks=placement.cached_blocks,
        uncached_tokens=placement.uncached_tokens,
        measured=placement.measured,
        gave_up=attempt.gave_up,
    )
    if weighed is not None:
        told.predicted.CopyFrom(_parts(weighed.parts(placement)))
        computes = placement.prefill or placement.decode
        told.computing.extend(_candidates(weighed.computing(), computes))
        if placement.prefill is not None:
            told.decoding.extend(_candidates(weighed.decoding(), placement.decode))
        told.decode_reason = weighed.why if isinstance(weighed, ByNumber) else ""
    return told


def _candidates(candidates: Iterable[Candidate], chosen: str) -> list[pb.Candidate]:
    return [
        pb.Candidate(
            worker=each.worker,
            chosen=each.worker == chosen,
            parts=_parts(each.parts) if each.parts is not None else None,
            cached_blocks=each.cached_blocks,
            all_s=each.all_s,
            number=each.number,
        )
        for each in candidates
    ]


def _parts(parts: Parts) -> pb.PredictedParts:
    return pb.PredictedParts(**{f"{name}_s": seconds for name, seconds in parts._asdict().items()})
