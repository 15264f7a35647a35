"""Times of one sequence: in order, and the parts sum up to the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.proto.types import LIFE_CYCLE
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.lifecycle import STALL_STAGES, TTFT_STAGES, Timeline

RECEIVED, UNIX = 500.0, 1_700_000_000.0  # the gateway's clock and the wall clock at one moment


def wall_ms(seconds: float) -> float:
    return (UNIX + seconds) * 1000


def whole_life(skew: float = 0.0) -> Timeline:
    timeline = Timeline(RECEIVED, UNIX)
    timeline.mark("admitted", RECEIVED + 0.001)
    timeline.mark("routed", RECEIVED + 0.002)
    timeline.merge(
        pb.SequenceTimes(
            prefill_queued=wall_ms(0.003 + skew),
            prefill_started=wall_ms(0.010 + skew),
            first_token=wall_ms(0.050 + skew),
            ticket_offered=wall_ms(0.050 + skew),
        )
    )
    timeline.mark("first_token", RECEIVED + 0.052)
    timeline.token(RECEIVED + 0.052)
    timeline.merge(
        pb.SequenceTimes(
            decode_queued=wall_ms(0.054 + skew),
            reserved=wall_ms(0.055 + skew),
            pulled=wall_ms(0.060 + skew),
            fenced=wall_ms(0.061 + skew),
            joined=wall_ms(0.061 + skew),
        )
    )
    timeline.mark_second_token(RECEIVED + 0.080)
    timeline.token(RECEIVED + 0.080)
    timeline.token(RECEIVED + 0.100)
    timeline.mark("finished", RECEIVED + 0.101)
    return timeline


def test_the_parts_of_ttft_and_of_the_stall() -> None:
    stages = whole_life().stages()
    expected = {
        "admission": 0.001, "routing": 0.001, "prefill_queue": 0.008, "prefill": 0.040,
        "delivery": 0.002, "decode_queue": 0.002, "reserve": 0.001, "pull": 0.005,
        "fence": 0.001, "first_step": 0.019,
    }  # fmt: skip
    assert stages == pytest.approx(expected, abs=1e-5)
    assert tuple(stages) == TTFT_STAGES + STALL_STAGES


def test_token_0_is_the_gateways_time() -> None:
    timings = whole_life().timings()
    assert timings.first_token == pytest.approx(0.052)
    assert timings.ticket_offered == pytest.approx(0.052), (
        "never before token 0, as it came with it"
    )
    assert timings.last_token == pytest.approx(0.100)
    assert timings.decode_queued == pytest.approx(0.054, abs=1e-5)


@given(st.floats(-1.0, 1.0))
def test_a_skewed_clock_distorts_no_sum_and_no_order(skew: float) -> None:
    timeline = whole_life(skew)
    at = timeline.ordered()
    assert list(at) == list(LIFE_CYCLE)
    assert list(at.values()) == sorted(at.values())
    stages = timeline.stages()
    assert sum(stages[name] for name in TTFT_STAGES) == pytest.approx(0.052)
    assert sum(stages[name] for name in STALL_STAGES) == pytest.approx(0.080 - 0.052)
    assert min(stages.values()) >= 0


def test_what_did_not_happen_is_unset() -> None:
    timeline = Timeline(RECEIVED, UNIX)
    timeline.mark("admitted", RECEIVED + 0.1)
    timeline.mark("finished", RECEIVED + 0.2)
    timings = timeline.timings()
    assert timings.HasField("admitted") and timings.HasField("finished")
    assert not timings.HasField("first_token") and not timings.HasField("joined")
    assert timeline.stages() == {}


def test_a_second_prefill_does_not_move_ttft() -> None:
    timeline = whole_life()
    before = timeline.stages()
    timeline.merge(pb.SequenceTimes(prefill_started=wall_ms(0.5), first_token=wall_ms(0.6)))
    timeline.mark("first_token", RECEIVED + 0.7)
    assert timeline.stages() == before
