"""Plans: the search, the arithmetic it starts from, and both on the simulator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crossdock.bench.traces import write_mooncake
from crossdock.cli import main
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.planning import guess
from crossdock.planning.plan import Planner, pools_of, profile_of, span, steady
from crossdock.planning.search import Outcome, Size, best_split, cheapest_pair, fewest
from crossdock.proto.errors import ConfigError, InvalidRequest
from crossdock.router.dispatch.lifecycle import Slo

MANIFEST = Path(__file__).parents[3] / "deploy" / "manifests" / "sim-8p8d.yaml"
H200 = Profile.NAMED["h200-llama-3.1-8b"]
SLO = Slo(2000, 30)


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [1, 2, 3, 7, 8, 63, 64])
@pytest.mark.parametrize("start", [1, 3, 8, 40, 64, 1000])
def test_the_fewest_is_found_from_any_guess(least: int, start: int) -> None:
    tried: list[int] = []

    def meets(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert fewest(1, start, 64, meets) == least
    assert len(tried) == len(set(tried)) <= 2 * 7 + 1


def test_where_nothing_meets_there_is_no_fewest() -> None:
    assert fewest(1, 5, 64, lambda count: False) is None
    assert fewest(1, 64, 64, lambda count: False) is None


class Cluster:
    """Meets the aim with so many workers of each kind, or more."""

    def __init__(self, prefill: int, decode: int) -> None:
        self.needs, self.tried = Size(prefill, decode), list[Size]()

    def __call__(self, size: Size) -> Outcome:
        self.tried.append(size)
        late = max(0, self.needs.prefill - size.prefill)
        slow = max(0, self.needs.decode - size.decode)
        return Outcome(1 - 0.05 * late - 0.05 * slow, late, slow)


@pytest.mark.parametrize("needs", [(1, 1), (3, 5), (12, 2), (2, 30)])
@pytest.mark.parametrize("start", [(1, 1), (4, 4), (20, 3), (30, 30)])
def test_the_cheapest_pair_is_found_from_any_guess(
    needs: tuple[int, int], start: tuple[int, int]
) -> None:
    cluster = Cluster(*needs)
    assert cheapest_pair(Size(*start), 64, 0.99, cluster) == Size(*needs)
    assert cheapest_pair(Size(*start), sum(needs) - 1, 0.99, cluster) is None


def test_the_best_split_is_that_which_attains_most() -> None:
    best, outcome = best_split(6, Size(1, 5), 0.99, Cluster(4, 4))
    assert (best.workers, round(outcome.attained, 3)) == (6, 0.9)


# -- the arithmetic --------------------------------------------------------------------------------


def test_a_prompt_takes_what_its_steps_take() -> None:
    one = guess.prompt_s(H200, 8192, 8192)
    assert one == pytest.approx(0.2488, rel=1e-3)
    assert guess.prompt_s(H200, 8192, 4096) == pytest.approx(one + H200.prefill_s)


def test_a_batch_is_in_balance_with_what_arrives() -> None:
    load = guess.Load(10.0, 1000.0, 4000.0, 250.0, 1100.0, 1.0)
    running = guess.running_on(load, H200, 10.0)
    assert running is not None
    step_s = H200.decode_s + running * (H200.decode_sequence_s + H200.decode_context_s * 1100)
    assert running / step_s == pytest.approx(10.0 * 250), "tokens drawn and asked for"
    most = 1 / (250 * (H200.decode_sequence_s + H200.decode_context_s * 1100))
    assert guess.running_on(load, H200, 1.01 * most) is None


def test_more_load_or_less_time_never_takes_fewer_workers() -> None:
    def workers(load: guess.Load, slo: Slo) -> tuple[int, int, int]:
        limits = (256, 800_000)
        return (
            guess.prefill_workers(load, H200, slo, 8192),
            guess.decode_workers(load, H200, slo, *limits),
            guess.colocated_workers(load, H200, slo, *limits, 512),
        )

    load = guess.Load(20.0, 4000.0, 9000.0, 300.0, 4200.0, 1.0)
    before = workers(load, SLO)
    assert min(before) >= 2
    for harder, slo in (
        (replace(load, rate=40.0), SLO),
        (replace(load, variation=9.0), SLO),
        (load, Slo(600, 12)),
    ):
        after = workers(harder, slo)
        assert all(a >= b for a, b in zip(after, before)) and after > before


def test_prompts_beside_decodes_are_cut_to_their_aim() -> None:
    assert guess.colocated_chunk(H200, SLO) == 512
    assert guess.colocated_chunk(H200, Slo(2000, 100)) == 2048
    assert guess.colocated_chunk(Profile(), SLO) == 8192


# -- on the simulator ------------------------------------------------------------------------------

SLOW = replace(H200, prefill_token_s=4e-4, decode_s=0.02, kv_memory_mb=20_000)


def planner(rate: float, most: int = 16, **slo: float) -> Planner:
    base = ClusterSpec.load(MANIFEST)
    base = replace(base, slo=replace(base.slo, **slo))
    trace = steady(rate, (900, 1100), (30, 50), 10.0, seed=3)
    trace = replace(trace, requests=trace.requests[:60])
    return Planner(base, SLOW, trace, pools_of(base, SLOW), 0.95, most)


def test_a_plan_meets_the_aim_and_nothing_smaller_does() -> None:
    made = planner(rate=5.0)
    made.profile = replace(SLOW, usd_per_gpu_hour=4.0)
    plan = made.plan()
    best = plan.best
    assert best is not None and best.outcome.attained >= 0.95
    assert best.report.slo_attainment == pytest.approx(best.outcome.attained)
    for workers in range(1, best.size.workers):
        splits = [Size(p, workers - p) for p in range(1, workers)]
        for size in (Size(colocated=workers), *splits):
            assert not made.attempt(size).meets(0.95), size
    assert plan.to_json()["best"] == vars(best.size)

    tokens = best.report.rate * best.report.output_tokens / best.report.requests * 3600
    assert best.usd_per_million_tokens == pytest.approx(4.0 * best.gpus / tokens * 1e6)


def test_what_no_cluster_can_meet_is_told_with_the_most_that_is_attained() -> None:
    lines: list[str] = []
    made = planner(rate=5.0, most=3, ttft_ms=300)
    made.progress = lines.append
    plan = made.plan()
    assert not any("meets it" in line for line in lines), lines
    assert plan.best is None and plan.verdict.startswith("no number of workers within the limit")
    assert plan.nearest is not None and plan.nearest.size.workers == 3
    assert f"{plan.nearest.size}: attains {plan.nearest.outcome.attained:.1%}" in lines
    assert 0 <= plan.nearest.outcome.attained < 0.95


def test_a_pool_whose_memory_nobody_knows_is_asked_for() -> None:
    base = ClusterSpec.load(MANIFEST)
    with pytest.raises(ConfigError, match=r"kv_memory_mb.*--kv-memory-mb"):
        pools_of(base, Profile())
    assert pools_of(base, Profile(), 512).kv_memory_mb == 512
    assert profile_of(base).kv_memory_mb == 109_900


def test_clumping_is_told_of_a_load_however_rare_it_is() -> None:
    rare = steady(1e-9, (10, 10), (10, 10), 60.0, seed=1)  # some 15,000 years of it
    assert guess.Load.of(rare, SLO).variation == pytest.approx(1.0, abs=0.01)
    rows = [replace(row, at_s=20.0 * (i // 10)) for i, row in enumerate(rare.requests)]
    clumped = guess.Load.of(replace(rare, requests=tuple(rows)), SLO)
    assert clumped.variation == pytest.approx(9.0, rel=0.02)


def test_a_rate_without_end_is_refused() -> None:
    for rate, seconds in ((float("inf"), 1.0), (1.0, float("inf"))):
        with pytest.raises(InvalidRequest, match="rate"):
            steady(rate, (1, 1), (1, 1), seconds, seed=0)


def test_lengths_are_a_number_or_a_range() -> None:
    assert (span("isl", "7"), span("isl", "7:9")) == ((7, 7), (7, 9))
    for wrong in ("", "x", "9:7", "0"):
        with pytest.raises(InvalidRequest, match="isl"):
            span("isl", wrong)


def test_the_command_plans_and_writes_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = steady(5.0, (900, 1100), (20, 20), 10.0, seed=3)
    write_mooncake(replace(trace, requests=trace.requests[:40]), tmp_path / "t.jsonl")
    load = [str(tmp_path / "t.jsonl"), "--slo", "ttft=2s,tpot=50ms"]
    assert main(["plan", *load, "--gpus", "4", "--usd-per-gpu-hour", "2", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"] == {"prefill": 0, "decode": 0, "colocated": 1}
    assert told["colocated"]["usd_per_hour"] == 2.0
    assert told["verdict"].startswith("do not disaggregate: co-located workers save 1 of 2 GPUs")
    assert main(["plan", "--isl", "10"]) == 2
    assert "--isl, --osl and --rate" in capsys.readouterr().err
