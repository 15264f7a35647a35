"""autoscale(): pure, in a world of small time slices and on single decisions."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from autoscale_kit import (
    CONFIG,
    DECODE,
    PREFILL,
    STEPS,
    Autoscaler,
    World,
    poisson,
    with_pools,
    with_settings,
)

from crossdock.deploy.autoscaling.autoscale import State, autoscale
from crossdock.deploy.autoscaling.forecast import Mean, Trend
from crossdock.deploy.autoscaling.observation import Observation, PoolState, StepTimes
from crossdock.deploy.autoscaling.sizing import (
    Aims,
    Load,
    batch_within,
    colocated_need,
    decode_need,
    prefill_need,
)
from crossdock.proto.types import Role
from crossdock.router.dispatch.traffic import Traffic

AIMS = Aims(2.0, 0.04, 0.99)
PROMPT, OUTPUT = 1000, 100


def seen(rate: float, prefill: int, decode: int, seconds: float = 10.0, **fields) -> Observation:
    """A steady load that is served in time. `fields`: of both pools, or of their traffic."""
    n = round(rate * seconds)
    counts = {name: fields.pop(name) for name in list(fields) if name in vars(Traffic())}
    traffic = Traffic(
        arrived=n,
        started=n,
        ttft_met=n,
        prompt_tokens=n * PROMPT,
        uncached_squares=n * PROMPT**2,
        finished=n,
        tpot_met=n,
        generated_tokens=n * OUTPUT,
    )
    pools = {
        name: PoolState(target, target, steps=STEPS, **fields)
        for name, target in (("prefill", prefill), ("decode", decode))
    }
    return Observation(seconds, pools, {"": replace(traffic, **counts)})


def settled(rate: float, config=CONFIG, rounds: int = 60, prefill: int = 2, decode: int = 2):
    """An autoscaler after a while of a steady load, its targets, and when it is."""
    scaler = Autoscaler(config)
    targets = {"prefill": prefill, "decode": decode}
    for i in range(rounds):
        targets = scaler(seen(rate, **targets), 10.0 * i)
    return scaler, targets, 10.0 * rounds


# -- the forecast ----------------------------------------------------------------------------------


def test_a_steady_rate_is_forecast_with_little_doubt_once_it_was_seen_for_a_while():
    rng, trend = random.Random(1), Trend()
    first = None
    for _ in range(60):
        trend = trend.observed(sum(rng.random() < 0.1 for _ in range(1000)), 10.0)
        first = first or trend.at(60.0)
    last = trend.at(60.0)
    assert last.mean == pytest.approx(10.0, rel=0.12)
    assert last.deviation < first.deviation / 4
    assert trend.at(0.0).deviation < last.deviation  # the farther ahead, the less is known


def test_a_ramp_is_forecast_where_it_leads():
    trend = Trend()
    for i in range(60):
        trend = trend.observed(round(10 * (1 + 0.2 * i)), 10.0)
    now = trend.at(0.0).mean
    assert trend.at(60.0).mean - now == pytest.approx(0.02 * 60, rel=0.3)


def test_a_turn_is_followed_within_a_few_observations():
    trend = Trend()
    for i in range(60):
        trend = trend.observed(100 if i < 50 else 300, 10.0)
    assert trend.at(0.0).mean == pytest.approx(30.0, rel=0.1)


def test_arrivals_that_clump_are_told_from_those_that_do_not():
    rng, even, clumped = random.Random(2), Trend(), Trend()
    for _ in range(200):
        even = even.observed(sum(rng.random() < 0.1 for _ in range(1000)), 10.0)
        clumped = clumped.observed(10 * sum(rng.random() < 0.01 for _ in range(1000)), 10.0)
    assert even.at(0).clumping < 3 < clumped.at(0).clumping


def test_nothing_is_forecast_of_nothing():
    assert Trend().at(30.0).mean == 0.0
    trend = Trend()
    for _ in range(20):
        trend = trend.observed(0, 10.0)
    assert trend.at(60.0).mean < 0.05


@pytest.mark.parametrize("between", [[0], [1] + [0] * 59])  # nothing, or one in ten minutes
def test_a_load_that_comes_after_hours_of_next_to_none_is_followed(between):
    trend = Trend()
    for count in [50] * 60 + between * (1440 // len(between)):
        trend = trend.observed(count, 10.0)
    assert trend.at(60.0).mean < 0.05
    for _ in range(12):
        trend = trend.observed(50, 10.0)
    assert trend.at(0.0).mean == pytest.approx(5.0, rel=0.1)


def test_a_load_that_comes_after_nothing_is_known_at_once():
    trend = Trend()
    for count in [50] * 60 + [0] * 60 + [50]:
        trend = trend.observed(count, 10.0)
    assert trend.at(0.0).mean == pytest.approx(5.0)


def test_lengths_can_be_told_until_they_have_faded_to_nothing():
    mean = Mean().observed(100, 50_000, 100 * 500.0**2, 1.0)
    while mean.count > 1e-300:
        mean = mean.observed(0, 0.0, 0.0, 0.5)
        assert mean.value == pytest.approx(500)
        assert mean.variation == pytest.approx(0.0, abs=1e-6)


def test_lengths_fade_and_vary():
    mean = Mean().observed(2, 200, 100**2 + 100**2, 1.0)
    assert (mean.value, mean.variation) == (100.0, 0.0)
    mean = mean.observed(2, 600, 300**2 + 300**2, 0.0)
    assert mean.value == 300.0
    assert Mean().observed(2, 400, 100**2 + 300**2, 1.0).variation == pytest.approx(0.25)
    assert Mean().value == Mean().variation == 0.0


# -- what a load needs -----------------------------------------------------------------------------


def load(rate: float, **fields) -> Load:
    return Load(rate, prompt_tokens=PROMPT, output_tokens=OUTPUT, **fields)


def test_more_load_less_time_and_more_clumping_need_more_prefill_workers():
    state = PoolState(1, 1, steps=STEPS)
    need = prefill_need(load(10), AIMS, PREFILL, state).workers
    assert 10 * 0.205 < need <= 5
    assert prefill_need(load(40), AIMS, PREFILL, state).workers > need
    assert prefill_need(load(10), replace(AIMS, ttft_s=0.3), PREFILL, state).workers > need
    assert prefill_need(load(10, clumping=16.0), AIMS, PREFILL, state).workers > need
    assert prefill_need(load(10, cached_tokens=900), AIMS, PREFILL, state).workers < need
    assert prefill_need(load(0), AIMS, PREFILL, state).workers == 1


def test_a_batch_is_bounded_by_tpot_by_places_and_by_kv():
    state = PoolState(1, 1, steps=STEPS)
    # 0.95 × 40 ms = 10 ms + 0.5 ms each
    assert batch_within(load(1), AIMS, DECODE, state) == pytest.approx(56)
    assert batch_within(load(1), AIMS, replace(DECODE, max_batch=8), state) == 8
    assert batch_within(load(1), AIMS, DECODE, replace(state, kv_tokens=11_000)) == pytest.approx(9)
    slow = replace(state, steps=StepTimes(decode_base_s=0.1, decode_sequence_s=0.001))
    assert batch_within(load(1), AIMS, DECODE, slow) == 64  # no worker meets it: room decides


def test_decode_workers_hold_those_that_run_at_once():
    state = PoolState(1, 1, steps=STEPS)
    busy = load(100)  # 100/s × 100 tokens × 38 ms = 380 at once, and 2.33 × √380 more
    assert decode_need(busy, AIMS, DECODE, state).workers == math.ceil((380 + 45.4) / 56)
    assert decode_need(load(0), AIMS, DECODE, state).workers == 1


def test_a_colocated_worker_does_both():
    state = PoolState(1, 1, steps=STEPS)
    pool = replace(PREFILL, role=Role.COLOCATED)
    both = colocated_need(load(20), AIMS, pool, state).workers
    assert both > prefill_need(load(20), AIMS, PREFILL, state).workers
    assert both >= 20 * 0.205 + 20 * 100 * 0.038 / 56


# -- decisions -------------------------------------------------------------------------------------


def test_nothing_changes_before_anything_is_known():
    quiet = seen(0.0, 3, 2)
    _, decision = autoscale(CONFIG, State(), quiet, 0.0)
    assert decision.targets == {"prefill": 3, "decode": 2}
    assert "no sequence was served" in decision.pools[0].reason
    cold = seen(5.0, 3, 2)
    unmeasured = {name: replace(each, steps=StepTimes()) for name, each in cold.pools.items()}
    _, decision = autoscale(CONFIG, State(), replace(cold, pools=unmeasured), 0.0)
    assert decision.targets == {"prefill": 3, "decode": 2}
    assert "no prompt was measured" in decision.pools[0].reason


def test_a_step_up_is_followed_at_once_and_its_reason_says_the_numbers():
    scaler, before, now = settled(5.0)
    after = scaler(seen(40.0, **before), now)
    assert after["prefill"] > before["prefill"]
    [change] = [each for each in scaler.decisions[-1].changes if each.pool == "prefill"]
    assert "sequences/s" in change.reason and "busy with prompts of 205 ms" in change.reason
    assert change.target >= change.floor


def test_a_step_down_waits_and_never_goes_below_what_is_needed():
    scaler, before, now = settled(40.0)
    targets, changed = before, []
    for i in range(60):
        after = scaler(seen(5.0, **targets), now + 10.0 * i)
        if after != targets:
            changed.append(10.0 * i)
        targets = after
    assert changed[0] >= 30.0  # three intervals, and as long as a start
    steady = settled(5.0)[1]
    assert targets["prefill"] <= steady["prefill"] + 1
    for decision in scaler.decisions[-60:]:
        assert all(each.target >= min(each.keep, each.before) for each in decision.pools)


def test_down_s_says_how_long_is_waited():
    config = with_settings(down_s=300.0)
    scaler, targets, now = settled(40.0, config)
    for i in range(29):
        assert scaler(seen(5.0, **targets), now + 10.0 * i) == targets


def test_noise_changes_little():
    rng = random.Random(3)
    scaler, targets = Autoscaler(CONFIG), {"prefill": 4, "decode": 3}
    changes = 0
    for i in range(200):
        rate = sum(rng.random() < 0.1 for _ in range(1000)) / 10.0
        after = scaler(seen(rate, **targets), 10.0 * i)
        changes += after != targets and i > 20
        targets = after
    assert changes <= 12


def test_the_bounds_of_a_pool_hold():
    config = with_pools(least=2, most=4)
    for rate in (0.1, 500.0):
        targets = settled(rate, config)[1]
        assert all(2 <= size <= 4 for size in targets.values())


def test_a_pool_of_fixed_size_is_left_alone_and_shares_the_work():
    fixed = replace(PREFILL, name="more", least=2, most=2)
    config = replace(CONFIG, pools=(*CONFIG.pools, fixed))
    scaler, targets = Autoscaler(config), {"prefill": 2, "decode": 2}
    alone = settled(40.0)[1]
    for i in range(60):
        now = seen(40.0, **targets)
        pools = {**now.pools, "more": PoolState(2, 2, steps=STEPS)}
        targets = scaler(replace(now, pools=pools), 10.0 * i)
        assert set(targets) == {"prefill", "decode"}
    assert targets["prefill"] == alone["prefill"] - 2


def test_models_have_demands_of_their_own():
    small = [replace(pool, model="small", name=f"small-{pool.name}") for pool in CONFIG.pools]
    config = replace(CONFIG, pools=(*CONFIG.pools, *small))
    scaler, targets = Autoscaler(config), dict.fromkeys([p.name for p in config.pools], 2)
    for i in range(60):
        busy, idle = seen(40.0, targets["prefill"], targets["decode"]), seen(1.0, 1, 1)
        pools = dict(busy.pools)
        for name, state in idle.pools.items():
            pools[f"small-{name}"] = replace(state, target=targets[f"small-{name}"])
        traffic = {"": busy.traffic[""], "small": idle.traffic[""]}
        targets = scaler(Observation(10.0, pools, traffic), 10.0 * i)
    assert targets["prefill"] > 5 and targets["small-prefill"] == 1


# -- the fast loop ---------------------------------------------------------------------------------


def test_a_queue_adds_prefill_workers_whatever_was_forecast():
    scaler, before, now = settled(10.0)
    after = scaler(seen(10.0, **before, queued_tokens=60_000), now)
    assert before["prefill"] < after["prefill"] <= 2 * before["prefill"]
    assert "s of prompts wait" in scaler.decisions[-1].pools[0].reason


def test_missed_first_tokens_add_prefill_workers_and_slow_ones_decode_workers():
    scaler, before, now = settled(10.0)
    late = scaler(seen(10.0, **before, ttft_met=50), now)
    assert late["prefill"] > before["prefill"] and late["decode"] == before["decode"]
    assert "50 of 100 sequences missed TTFT" in scaler.decisions[-1].pools[0].reason
    scaler, before, now = settled(10.0)
    slow = scaler(seen(10.0, **before, tpot_met=50, running=30 * before["decode"]), now)
    assert slow["decode"] > before["decode"] and slow["prefill"] == before["prefill"]


def test_two_misses_are_chance():
    scaler, before, now = settled(10.0)
    assert scaler(seen(10.0, **before, ttft_met=98), now) == before


def test_those_whom_no_worker_could_serve_in_time_start_none():
    """Prompts that take longer than TTFT alone, on workers that have time for them."""
    scaler, targets, now = settled(1.0, prefill=4, decode=2, config=with_settings(down_s=3600.0))
    for i in range(30):
        after = scaler(seen(1.0, **targets, ttft_met=0, tpot_met=0), now + 10.0 * i)
        assert after == targets


def test_no_more_are_added_before_those_that_start_could_help():
    scaler, targets, now = settled(10.0)
    sizes = []
    for i in range(12):
        targets = scaler(seen(10.0, **targets, ttft_met=50), now + 10.0 * i)
        sizes.append(targets["prefill"])
    raised = [i for i in range(1, 12) if sizes[i] > sizes[i - 1]]
    assert raised == [4, 8]  # a start of 30 s and an interval later


def test_the_pause_between_two_raises_is_as_long_as_starts_were_measured_to_take():
    scaler, targets, now = settled(10.0)
    once = replace(seen(10.0, **targets), pools={})
    slow = {n: replace(s, started_s=(90.0, 90.0)) for n, s in seen(10.0, **targets).pools.items()}
    targets = scaler(replace(once, pools=slow), now)
    sizes = []
    for i in range(1, 14):
        targets = scaler(seen(10.0, **targets, ttft_met=50), now + 10.0 * i)
        sizes.append(targets["prefill"])
    raised = [i for i in range(1, 13) if sizes[i] > sizes[i - 1]]
    assert raised == [10]


# -- both pools together ---------------------------------------------------------------------------


def test_a_pool_with_too_many_gives_to_an_alike_one_before_any_is_started():
    patient = with_settings(down_s=3600.0)
    scaler, before, now = settled(10.0, patient, prefill=3, decode=8, rounds=8)
    after = scaler(seen(10.0, **before, queued_tokens=60_000), now)
    gained = after["prefill"] - before["prefill"]
    assert gained > 0 and after["decode"] == before["decode"] - gained
    assert f"{gained} from decode" in scaler.decisions[-1].pools[0].reason
    assert f"{gained} to prefill" in scaler.decisions[-1].pools[1].reason


def test_pools_that_are_not_alike_give_each_other_nothing():
    patient = with_settings(down_s=3600.0)
    config = replace(patient, pools=(PREFILL, replace(DECODE, alike="b")))
    scaler, before, now = settled(10.0, config, prefill=3, decode=8, rounds=8)
    after = scaler(seen(10.0, **before, queued_tokens=60_000), now)
    assert after["prefill"] > before["prefill"] and after["decode"] == before["decode"]


def test_the_bound_on_gpus_holds_and_both_keep_their_share():
    config = with_settings(gpus=8.0)
    for rate in (1.0, 20.0, 200.0):
        scaler, targets, _ = settled(rate, config)
        assert sum(targets.values()) <= 8
        assert min(targets.values()) >= 1
    assert "8 allowed" in scaler.decisions[-1].pools[0].reason
    floors = [each.floor for each in scaler.decisions[-1].pools]
    ratios = [targets[name] / floor for name, floor in zip(targets, floors)]
    assert max(ratios) < 2 * min(ratios)


def test_workers_of_several_gpus_count_as_many():
    config = replace(with_settings(gpus=8.0), pools=(replace(PREFILL, gpus=2.0), DECODE))
    targets = settled(200.0, config)[1]
    assert 2 * targets["prefill"] + targets["decode"] <= 8


def test_under_the_bound_noise_does_not_swap_workers():
    rng = random.Random(4)
    config = with_settings(gpus=8.0)
    scaler, targets, now = settled(60.0, config)
    changes = 0
    for i in range(100):
        rate = 60.0 + rng.uniform(-3, 3)
        after = scaler(seen(rate, **targets), now + 10.0 * i)
        changes += after != targets
        targets = after
    assert changes <= 2


def test_a_dry_run_decides_as_ever():
    config = with_settings(dry_run=True)
    _, decision = autoscale(config, State(), seen(40.0, 2, 2), 0.0)
    assert decision.changes


# -- in the small world ----------------------------------------------------------------------------


def attained(world: World) -> tuple[float, float]:
    counts = world.counts.now
    return counts.ttft_met / counts.started, counts.tpot_met / counts.finished


def test_a_ramp_is_met_before_it_comes():
    """A start takes a minute, in which the load grows by a fifth of what it was."""
    arrivals = poisson(lambda t: 4 + t / 75, 1200, random.Random(5))
    world = World(with_pools(start_s=60.0), start_s=60.0)
    world.run(arrivals, Autoscaler(world.config), 1200, first=(2, 1))
    assert min(attained(world)) > 0.98


def test_a_fresh_state_takes_nobody_away_at_once():
    """As after a restart of the controller, at a load that needs what is there."""
    arrivals = poisson(lambda t: 24.0, 300, random.Random(6))
    world = World(CONFIG)
    world.run(arrivals, Autoscaler(CONFIG), 300, first=(8, 4))
    assert min(prefill for _, prefill, _ in world.sizes[:6]) == 8
    assert min(attained(world)) > 0.98


def test_a_shift_from_prompts_to_answers_moves_workers():
    rng = random.Random(7)
    long_prompts = poisson(lambda t: 10.0, 600, rng, uncached=3000, output=20)
    long_answers = poisson(lambda t: 10.0, 600, rng, uncached=100, output=800)
    arrivals = long_prompts + [(600 + t, *lengths) for t, *lengths in long_answers]
    world = World(with_settings(gpus=14.0))
    scaler = Autoscaler(world.config)
    world.run(arrivals, scaler, 1200, first=(7, 3))
    (_, most, few), (_, least, many) = world.sizes[55], world.sizes[-1]
    assert most > least + 3 and many > few + 3
    reasons = [each.reason for d in scaler.decisions for each in d.changes]
    assert any(" from prefill" in reason for reason in reasons)
