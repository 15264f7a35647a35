"""How long completions are expected to be, and what their blocks cost."""

from __future__ import annotations

import random

import pytest
from view_kit import BLOCK, connect, demand, make_view, report

from crossdock.proto.types import Role
from crossdock.router.placement.demand import OUTPUT_TOKENS
from crossdock.router.placement.latency import predicted_latency
from crossdock.router.placement.lengths import MOST_CLASSES, Lengths


def test_completions_are_as_long_as_those_of_the_tenants_prompts_of_like_length() -> None:
    lengths, rng = Lengths(), random.Random(1)
    assert lengths.expected("a", 1000, 4096) == OUTPUT_TOKENS
    for _ in range(200):
        lengths.ended("a", rng.randint(520, 1000), rng.randint(450, 550))
        lengths.ended("a", rng.randint(10_000, 16_000), rng.randint(10, 30))
        lengths.ended("b", 700, 50)
    assert lengths.expected("a", 600, 4096) == pytest.approx(500, rel=0.1)
    assert lengths.expected("a", 12_000, 4096) == pytest.approx(20, rel=0.5)
    assert lengths.expected("b", 600, 4096) == pytest.approx(50, rel=0.3)
    assert lengths.expected("c", 600, 4096) == pytest.approx(lengths.mean), "as all are"
    assert lengths.mean == pytest.approx(190, rel=0.1)


def test_what_a_completion_may_have_and_has_counts() -> None:
    lengths = Lengths()
    for _ in range(100):
        lengths.ended("a", 100, 400)
    assert lengths.expected("a", 100, 64) == 64
    assert lengths.expected("a", 100, 4096, generated=100) == pytest.approx(300, rel=0.1)
    assert lengths.expected("a", 100, 4096, generated=1000) == pytest.approx(200, rel=0.1)
    assert lengths.expected("a", 100, 1001, generated=1000) == 1


def test_a_change_is_followed_and_nothing_grows() -> None:
    lengths = Lengths()
    for i in range(MOST_CLASSES + 500):
        lengths.ended(f"tenant{i}", 100, 10)
    assert len(lengths._classes) == MOST_CLASSES
    assert lengths.expected("tenant0", 100, 4096) == lengths.expected("nobody", 100, 4096)
    for _ in range(500):
        lengths.ended("a", 100, 800)
    assert lengths.expected("a", 100, 4096) == pytest.approx(800, rel=0.05)


def test_streams_go_where_their_blocks_will_be_there(rng: random.Random) -> None:
    """Both have room for the prompt; on one, those that run will need what is left."""
    view = make_view(p0=Role.PREFILL)
    steps = {"step_base_s": 0.02, "step_per_sequence_s": 0.0001}
    for name, running, free in (("d0", 10, 100), ("d1", 10, 900)):
        connect(view, name, Role.DECODE)
        report(view, name, running=running, free_blocks=free, **steps)
    asked = demand(160, output=200.0)
    assert {predicted_latency(view, asked, 0.0, rng).decode for _ in range(20)} == {"d0", "d1"}
    for _ in range(100):
        view.ended("d0", "t", 160, 200)
    for name, running, free in (("d0", 10, 100), ("d1", 10, 900)):
        report(view, name, now=1.0, running=running, free_blocks=free, **steps)
    assert {predicted_latency(view, asked, 1.0, rng).decode for _ in range(20)} == {"d1"}


def test_a_prompt_goes_where_it_evicts_nothing(rng: random.Random) -> None:
    view = make_view(p0=Role.PREFILL, p1=Role.PREFILL, d0=Role.DECODE)
    report(view, "p0", free_blocks=0, cached_blocks=1000)
    report(view, "p1", free_blocks=100, cached_blocks=900)
    assert {predicted_latency(view, demand(100 * BLOCK), 0.0, rng).prefill} == {"p1"}


def test_a_stream_does_not_make_all_of_a_batch_miss_their_target(rng: random.Random) -> None:
    view = make_view(p0=Role.PREFILL)
    for name, running, context in (("d0", 60, 0), ("d1", 4, 400_000)):
        connect(view, name, Role.DECODE)
        report(
            view, name, running=running, context_tokens=context, step_base_s=0.01,
            step_per_sequence_s=0.0003, step_context_s=5e-8,
        )  # fmt: skip
    asked = demand(160)
    assert predicted_latency(view, asked, 0.0, rng).decode == "d0"  # 28 ms, not 32
    aims = demand(160, tpot_s=0.027)
    assert predicted_latency(view, aims, 0.0, rng).decode == "d1", "60 others would miss it, not 4"
