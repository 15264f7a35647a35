"""Placement: pure decisions over a view, with the clock and the dice in the test's hands."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from view_kit import BLOCK, add, cache, connect, demand, make_view, report, two_and_two

from crossdock.proto.types import Role
from crossdock.router.placement.demand import NoWorker
from crossdock.router.placement.latency import decode_for, predicted_latency
from crossdock.router.placement.pairs import PAIR_BACK_OFF_S
from crossdock.router.placement.peers import round_robin
from crossdock.router.placement.policy import Policy
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import FAILED_FOR_S, MEASURED_FOR_S, STALE_AFTER_S


def test_a_prefix_hit_wins_where_queues_are_alike(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(1600)
    cache(view, "p1", list(asked.block_hashes[:90]))
    placement = predicted_latency(view, asked, 0.0, rng)
    assert placement.prefill == "p1"
    assert placement.cached_blocks == 90
    assert placement.uncached_tokens == 1600 - 90 * BLOCK


def test_a_deeper_queue_outweighs_a_prefix_hit(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(1600)
    cache(view, "p1", list(asked.block_hashes[:90]))
    report(view, "p1", queued_tokens=2000)  # computing 1440 tokens anew is quicker than waiting
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p0"
    report(view, "p1", queued_tokens=1000)
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p1"


def test_one_slow_measurement_does_not_keep_work_from_an_idle_worker(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(1000)
    report(view, "p0", prefill_tokens_per_s=100.0)
    report(view, "d0", step_base_s=0.5, step_per_sequence_s=0.0)
    for _ in range(50):
        report(view, "p1", prefill_tokens_per_s=1000.0 + rng.random())
        report(view, "d1", step_base_s=0.01 + rng.random() / 1000, step_per_sequence_s=0.0)
    chosen = [predicted_latency(view, asked, 0.0, rng) for _ in range(40)]
    assert {c.prefill for c in chosen} == {"p0", "p1"}
    assert {c.decode for c in chosen} == {"d0", "d1"}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e308, -1.0])
@pytest.mark.parametrize("field", ["prefill_base_s", "prefill_attention_s", "step_context_s"])
def test_what_no_step_can_take_counts_as_not_measured(
    field: str, wrong: float, rng: random.Random
) -> None:
    """Neither of that worker nor in the mean of its pool."""
    view, asked = two_and_two(), demand(1000)
    for name in ("p0", "d0"):
        report(view, name, prefill_tokens_per_s=100.0, step_base_s=0.1, **{field: wrong})
    assert None in (view.workers["p0"].prefill_line, view.workers["p0"].decode_line)
    assert 0.5 < predicted_latency(view, asked, 0.0, rng).predicted_ttft_s < 20


@pytest.mark.parametrize("field", ["yielding_tokens", "yielding_attention", "late_tokens"])
def test_no_wait_is_less_than_none_where_a_report_contradicts_itself(
    field: str, rng: random.Random
) -> None:
    view, times = two_and_two(), {"prefill_base_s": 0.01, "prefill_attention_s": 1e-6}
    for name in ("p0", "p1"):
        report(view, name, prefill_tokens_per_s=1000.0, **times, **{field: 10**9})
    assert predicted_latency(view, demand(1000), 0.0, rng).predicted_ttft_s >= 1


def test_a_new_worker_is_presumed_as_fast_as_its_pool(rng: random.Random) -> None:
    view = make_view(p0=Role.PREFILL)
    add(view, "d0", Role.DECODE, step_base_s=0.001, step_per_sequence_s=0.001, running=3)
    add(view, "d1", Role.DECODE)
    assert predicted_latency(view, demand(100), 0.0, rng).decode == "d1"


def test_what_was_first_measured_of_prompts_is_known_at_once() -> None:
    view = ClusterView()
    connect(view, "p0", Role.PREFILL)
    report(view, "p0", prefill_tokens_per_s=100.0)
    assert view.token_s == pytest.approx(0.01)


def test_a_slower_worker_needs_a_shorter_queue(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(1000)
    report(view, "p0", prefill_tokens_per_s=250.0, queued_tokens=10)
    report(view, "p1", prefill_tokens_per_s=1000.0, queued_tokens=2000)
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p1"  # 3 s against 4 s
    report(view, "p1", prefill_tokens_per_s=1000.0, queued_tokens=3500)
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p0"


def test_predicted_ttft_is_queue_and_own_and_waits_for_no_transfer(rng: random.Random) -> None:
    view, asked = make_view(p0=Role.PREFILL, d0=Role.DECODE), demand(160)
    view.transferred("p0", "d0", nbytes=1000, seconds=1.0)  # 10 s for this prompt
    report(view, "p0", queued_tokens=500, prefill_tokens_per_s=100.0)
    placement = predicted_latency(view, asked, 0.0, rng)
    assert placement.predicted_ttft_s == pytest.approx((500 + 160) / 100)
    assert placement.measured


def test_predicted_ttft_counts_the_fixed_time_of_each_step(rng: random.Random) -> None:
    """Prompts that wait share their last chunks with those after them."""
    view = make_view(d0=Role.DECODE)
    connect(view, "p0", Role.PREFILL, chunk_tokens=512)
    report(view, "p0", prefill_base_s=0.03, prefill_tokens_per_s=1000.0, queued_tokens=768)
    placement = predicted_latency(view, demand(160), 0.0, rng)
    assert placement.predicted_ttft_s == pytest.approx(1.5 * 0.03 + 0.768 + 0.03 + 0.16)


def test_what_was_measured_long_ago_or_on_small_steps_is_not_known(rng: random.Random) -> None:
    """It may be wrong, and refusing by it would keep it from being corrected."""
    view, long = make_view(d0=Role.DECODE), demand(15_000, block_hashes=[])
    connect(view, "p0", Role.PREFILL, chunk_tokens=512)
    report(view, "p0", prefill_tokens_per_s=300.0, prefill_step_tokens=60)
    assert predicted_latency(view, demand(160), 0.0, rng).measured
    assert not predicted_latency(view, long, 0.0, rng).measured
    report(view, "p0", prefill_tokens_per_s=9000.0, prefill_step_tokens=512)
    assert predicted_latency(view, long, 0.0, rng).measured
    late = MEASURED_FOR_S + 1
    report(view, "p0", now=late, prefill_tokens_per_s=9000.0, prefill_step_tokens=512)
    assert not predicted_latency(view, long, late, rng).measured


def test_a_slow_link_turns_the_pair(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(160)
    for pair in (("p0", "d0"), ("p0", "d1"), ("p1", "d0")):
        view.transferred(*pair, nbytes=1000, seconds=1.0)  # 1 KB/s: 10 s for this prompt
    view.transferred("p1", "d1", nbytes=1000, seconds=0.1)
    placement = predicted_latency(view, asked, 0.0, rng)
    assert (placement.prefill, placement.decode) == ("p1", "d1")


def test_requests_are_not_locked_to_the_pairs_that_were_measured(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(15_000)  # 1 ms by default, 0.1 ms as it is
    pairs = Counter()
    for _ in range(60):
        placement = predicted_latency(view, asked, 0.0, rng)
        assert placement.prefill is not None
        view.transferred(placement.prefill, placement.decode, nbytes=10**7, seconds=0.001)
        pairs[placement.prefill, placement.decode] += 1
    assert len(pairs) == 4 and min(pairs.values()) >= 5


def test_blocks_that_decode_holds_are_not_counted_as_transfer(rng: random.Random) -> None:
    view, asked = make_view(p0=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE), demand(160)
    for decode in ("d0", "d1"):
        view.transferred("p0", decode, nbytes=1000, seconds=1.0)
    cache(view, "d1", list(asked.block_hashes))
    assert predicted_latency(view, asked, 0.0, rng).decode == "d1"


def test_decode_goes_to_the_least_tpot_after_joining(rng: random.Random) -> None:
    view = two_and_two()
    report(view, "d0", running=8, step_base_s=0.02, step_per_sequence_s=0.004)
    report(view, "d1", running=3, step_base_s=0.02, step_per_sequence_s=0.004)
    assert predicted_latency(view, demand(), 0.0, rng).decode == "d1"
    report(view, "d0", running=8, step_base_s=0.01, step_per_sequence_s=0.001)
    assert predicted_latency(view, demand(), 0.0, rng).decode == "d0"  # 19 ms against 36 ms


def test_decode_must_fit_the_blocks(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(160)  # 11 blocks with room for the next token
    report(view, "d0", free_blocks=10, cached_blocks=0, running=0)
    report(view, "d1", free_blocks=3, cached_blocks=8, running=50)
    assert predicted_latency(view, asked, 0.0, rng).decode == "d1"
    report(view, "d1", free_blocks=1, cached_blocks=1, running=0)
    assert predicted_latency(view, asked, 0.0, rng).decode == "d0"  # none fits: the most room


def test_prefill_must_have_room_for_the_blocks(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(160)
    report(view, "p0", free_blocks=4, cached_blocks=6)  # of 11; leases pin the others
    report(view, "p1", queued_tokens=1000)
    assert {predicted_latency(view, asked, 0.0, rng).prefill for _ in range(20)} == {"p1"}
    report(view, "p1", free_blocks=2, cached_blocks=1)
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p0"  # none fits: the most room
    cache(view, "p1", list(asked.block_hashes[:9]))
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p1"  # 9 of the 11 are there


def batches(**sequences: int) -> ClusterView:
    """Decode workers of flat step times, with places for 8."""
    view = make_view(p0=Role.PREFILL)
    for name, count in sequences.items():
        connect(view, name, Role.DECODE, max_batch=8)
        steps = {"step_base_s": 0.02, "step_per_sequence_s": 0.00001}
        report(view, name, running=min(8, count), waiting=max(0, count - 8), **steps)
    return view


def test_a_cached_prefix_is_no_reason_to_wait_for_a_place_in_a_batch(rng: random.Random) -> None:
    asked = demand(160)
    for deep, other, chosen in ((8, 7, "d1"), (9, 0, "d1"), (20, 8, "d1"), (3, 3, "d0")):
        view = batches(d0=deep, d1=other)
        view.transferred("p0", "d0", nbytes=10**6, seconds=1.0)  # 10 ms for this prompt
        cache(view, "d0", list(asked.block_hashes))
        assert {predicted_latency(view, asked, 0.0, rng).decode for _ in range(20)} == {chosen}
        assert {decode_for(view, asked, "p0", 0.0, rng) for _ in range(20)} == {chosen}


def test_a_shared_prefix_does_not_gather_streams_on_the_few_who_have_it(rng: random.Random) -> None:
    view, asked = batches(**{f"d{i}": 0 for i in range(30)}), demand(160)
    for i in range(4):
        cache(view, f"d{i}", list(asked.block_hashes))
    for i in range(120):
        placement = predicted_latency(view, asked, 0.0, rng)
        view.place(placement.decode, f"s{i}", 0, asked.blocks)
    counts = [view.workers[f"d{i}"].sequences for i in range(30)]
    assert min(counts) >= 2 and max(counts) <= 8


def test_a_burst_before_the_next_report_is_spread(rng: random.Random) -> None:
    view = make_view(**{f"p{i}": Role.PREFILL for i in range(4)}, d0=Role.DECODE, d1=Role.DECODE)
    prefills: Counter[str] = Counter()
    decodes: Counter[str] = Counter()
    for i in range(40):
        asked = demand(160, block_hashes=[])
        placement = predicted_latency(view, asked, 0.001 * i, rng)
        assert placement.prefill is not None
        prefills[placement.prefill] += 1
        decodes[placement.decode] += 1
        view.place(placement.prefill, f"s{i}", placement.uncached_tokens, asked.blocks)
        view.place(placement.decode, f"s{i}", 0, asked.blocks)
    assert set(prefills.values()) == {10}
    assert set(decodes.values()) == {20}


def test_gateways_with_one_old_view_do_not_herd() -> None:
    asked = demand(160, block_hashes=[])
    chosen = Counter()
    for gateway in range(200):  # each decides by itself, none sees the others' placements
        view = make_view(**{f"p{i}": Role.PREFILL for i in range(4)}, d0=Role.DECODE)
        chosen[predicted_latency(view, asked, 0.0, random.Random(gateway)).prefill] += 1
    assert len(chosen) == 4
    assert max(chosen.values()) < 100


def test_an_engine_that_hangs_gets_no_work(rng: random.Random) -> None:
    view, asked = two_and_two(), demand()
    for name in ("p0", "d1"):
        report(view, name, age_s=0.4, late=True)
    chosen = [predicted_latency(view, asked, 0.0, rng) for _ in range(20)]
    assert {(c.prefill, c.decode) for c in chosen} == {("p1", "d0")}
    report(view, "p1", queued_tokens=10**6)
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p1"
    view.disconnected("p1", "p1-incarnation")
    assert predicted_latency(view, asked, 0.0, rng).prefill == "p0", "better than nobody"
    report(view, "d1")
    assert {predicted_latency(view, asked, 0.0, rng).decode for _ in range(20)} == {"d0", "d1"}


def test_draining_stale_and_avoided_workers(rng: random.Random) -> None:
    view, asked = two_and_two(), demand()
    report(view, "p0", draining=True)
    assert {predicted_latency(view, asked, 0.0, rng).prefill for _ in range(20)} == {"p1"}
    view = two_and_two()
    late = STALE_AFTER_S + 1
    for name in ("p0", "d0", "d1"):
        report(view, name, now=late)
    assert view.workers["p1"].is_stale(late)
    assert {predicted_latency(view, asked, late, rng).prefill for _ in range(20)} == {"p0"}
    view = two_and_two()
    shy = demand(avoid=frozenset({"p0"}))
    assert {predicted_latency(view, shy, 0.0, rng).prefill for _ in range(20)} == {"p1"}
    nobody = demand(avoid=frozenset({"p0", "p1"}))
    assert predicted_latency(view, nobody, 0.0, rng).prefill in {"p0", "p1"}, "better than nobody"


def test_a_broken_device_comes_after_all_others(rng: random.Random) -> None:
    view, shy = two_and_two(), demand(avoid=frozenset({"d0"}))
    late = STALE_AFTER_S + 1
    for name in ("p0", "p1", "d0"):  # d0 answers, since it fails every step at once
        report(view, name, now=late)
    assert predicted_latency(view, shy, late, rng).decode == "d0", "it was one failure"
    view.device_failed("d0", late)
    assert predicted_latency(view, shy, late, rng).decode == "d1"
    report(view, "d1", now=late)
    assert {predicted_latency(view, demand(), late, rng).decode for _ in range(20)} == {"d1"}
    later = late + FAILED_FOR_S
    assert {predicted_latency(view, demand(), later, rng).decode for _ in range(20)} == {"d0", "d1"}


def test_a_missing_role_is_named(rng: random.Random) -> None:
    with pytest.raises(NoWorker, match="no prefill worker is ready"):
        predicted_latency(make_view(d0=Role.DECODE), demand(), 0.0, rng)
    with pytest.raises(NoWorker, match="no decode worker is ready"):
        round_robin(make_view(p0=Role.PREFILL), demand(), 0.0, rng, 0)
    with pytest.raises(NoWorker, match="no prefill and no decode worker is ready"):
        predicted_latency(ClusterView(), demand(), 0.0, rng)


def test_colocated_workers_take_both_phases(rng: random.Random) -> None:
    view, asked = make_view(c0=Role.COLOCATED, c1=Role.COLOCATED), demand(160)
    cache(view, "c1", list(asked.block_hashes[:9]))
    placement = predicted_latency(view, asked, 0.0, rng)
    assert (placement.prefill, placement.decode, placement.cached_blocks) == (None, "c1", 9)


def test_colocated_and_disaggregated_are_weighed(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(160)
    add(view, "c0", Role.COLOCATED)
    for name in ("p0", "p1"):
        report(view, name, queued_tokens=5000)
    assert predicted_latency(view, asked, 0.0, rng).prefill is None
    report(view, "c0", queued_tokens=9000)
    assert predicted_latency(view, asked, 0.0, rng).prefill is not None


def test_round_robin_takes_turns_blind_to_load(rng: random.Random) -> None:
    view = two_and_two()
    report(view, "p0", queued_tokens=10**6)
    chosen = [round_robin(view, demand(), 0.0, rng, turn) for turn in range(4)]
    assert [c.prefill for c in chosen] == ["p0", "p1", "p0", "p1"]
    assert [c.decode for c in chosen] == ["d0", "d1", "d0", "d1"]


def test_another_decode_worker_for_a_computed_prompt(rng: random.Random) -> None:
    view = two_and_two()
    report(view, "d0", running=9)
    assert decode_for(view, demand(), "p0", 0.0, rng) == "d1"
    with pytest.raises(NoWorker):
        decode_for(make_view(p0=Role.PREFILL), demand(), "p0", 0.0, rng)


@pytest.mark.parametrize("policy", [predicted_latency, round_robin])
def test_a_sequence_goes_where_it_can_be_held_to_its_end(
    rng: random.Random, policy: Policy
) -> None:
    view = ClusterView()
    for name, role, blocks in (
        ("p0", Role.PREFILL, 10), ("p1", Role.PREFILL, 40),
        ("d0", Role.DECODE, 40), ("d1", Role.DECODE, 12),
    ):  # fmt: skip
        connect(view, name, role, num_blocks=blocks)

    def chosen(tokens: int, completion: int) -> set[tuple[str | None, str]]:
        asked = demand(tokens, most_tokens=tokens + completion, output=1.0)
        taken = [policy(view, asked, 0.0, rng, turn) for turn in range(40)]
        return {(placement.prefill, placement.decode) for placement in taken}

    assert {decode for _, decode in chosen(100, 92)} == {"d0", "d1"}
    assert {decode for _, decode in chosen(100, 93)} == {"d0"}
    assert {prefill for prefill, _ in chosen(158, 93)} == {"p0", "p1"}
    assert {prefill for prefill, _ in chosen(159, 93)} == {"p1"}, "token 0 would be p0's last"
    assert {prefill for prefill, _ in chosen(159, 1)} == {"p0", "p1"}, "as it is the request's"
    assert chosen(600, 40) == {("p1", "d0")}
    assert decode_for(view, demand(100, most_tokens=200), "p0", 0.0, rng) == "d0"
    with pytest.raises(NoWorker, match="no prefill and no decode worker that holds 641 tokens"):
        chosen(639, 2)


def test_a_facts_context_bounds_it_below_its_pool(rng: random.Random) -> None:
    view = make_view(p0=Role.PREFILL, p1=Role.PREFILL, d0=Role.DECODE)
    connect(view, "p0", Role.PREFILL, context_length=100)
    assert {predicted_latency(view, demand(160), 0.0, rng).prefill for _ in range(20)} == {"p1"}


@pytest.mark.parametrize("policy", [predicted_latency, round_robin])
def test_a_pair_whose_pull_failed_backs_off_and_its_two_workers_work_on(
    rng: random.Random, policy: Policy
) -> None:
    view = two_and_two()

    def pairs(now: float) -> set[tuple[str | None, str]]:
        for name in view.workers:
            report(view, name, now)
        chosen = [policy(view, demand(), now, rng, turn) for turn in range(100)]
        return {(placement.prefill, placement.decode) for placement in chosen}

    view.pull_failed("p0", "d0", 0.0)
    first, _ = PAIR_BACK_OFF_S
    others = pairs(first / 2)
    assert ("p0", "d0") not in others
    assert {pair[0] for pair in others} == {"p0", "p1"}
    assert policy is round_robin or {pair[1] for pair in others} == {"d0", "d1"}
    assert decode_for(view, demand(), "p0", first / 2, rng) == "d1"
    assert any(decode_for(view, demand(), "p1", first / 2, rng) == "d0" for _ in range(50))
    view.pull_failed("p0", "d1", first / 2)
    if (
        policy is predicted_latency
    ):  # the baseline takes its turns with prefill workers all the same
        assert pairs(first / 2) == {("p1", "d0"), ("p1", "d1")}
    view.pull_failed("p1", "d0", first / 2)
    view.pull_failed("p1", "d1", first / 2)
    assert pairs(first / 2)  # nobody else is left


def chat_on(view: ClusterView, name: str, prefill_blocks: int = 10) -> None:
    """A worker answered a chat's last turn: it has all of it but the newest message."""
    blocks = list(demand(480).block_hashes)
    for prefill in ("p0", "p1"):
        cache(view, prefill, blocks[:prefill_blocks])
    cache(view, name, blocks[:27])


def test_the_next_turn_of_a_chat_goes_to_the_decode_worker_that_has_the_last(
    rng: random.Random,
) -> None:
    view, asked = two_and_two(), demand(480, local_tokens=64)
    chat_on(view, "d1")
    for _ in range(20):
        placement = predicted_latency(view, asked, 0.0, rng)
        assert (placement.prefill, placement.decode) == (None, "d1")
        assert (placement.cached_blocks, placement.uncached_tokens) == (27, 48)
        assert placement.predicted_ttft_s == pytest.approx(0.048)


def test_a_chat_stays_where_its_worker_alone_was_measured_lately(rng: random.Random) -> None:
    """What a worker measured in the last turn is presumed of those that were idle meanwhile, too:
    they are no quicker for having been looked at before that."""
    view = two_and_two()
    chat_on(view, "d1")
    for name in ("p0", "p1"):
        report(view, name, prefill_tokens_per_s=100_000.0)
    for name in ("d0", "d1"):
        report(view, name, step_base_s=0.001)
    for turn in range(20):
        now, step_s = turn / 10, 0.001 * (1 + turn)
        asked = demand(480, local_tokens=64, output=100.0)
        assert predicted_latency(view, asked, now, rng).prefill is None
        report(view, "d1", now=now, running=1, step_base_s=step_s)
        report(view, "d1", now=now, step_base_s=step_s)


def test_a_decode_worker_computes_no_more_than_it_may(rng: random.Random) -> None:
    view = two_and_two()
    chat_on(view, "d1")
    for most in (0, 47):
        assert predicted_latency(view, demand(480, local_tokens=most), 0.0, rng).prefill is not None
    report(view, "d1", queued_tokens=20)  # with its own it would be more than 64
    assert predicted_latency(view, demand(480, local_tokens=64), 0.0, rng).prefill is not None
    assert predicted_latency(view, demand(480, local_tokens=68), 0.0, rng).prefill is None


def test_a_prompt_that_prefill_workers_have_as_well_is_theirs(rng: random.Random) -> None:
    view = two_and_two()
    chat_on(view, "d1", prefill_blocks=27)
    assert predicted_latency(view, demand(480, local_tokens=64), 0.0, rng).prefill is not None


def test_the_worker_that_answered_the_last_turn_needs_no_block_more_than_others(
    rng: random.Random,
) -> None:
    """It may have the block that the answer ended in, of which nobody is told."""
    view = two_and_two()
    chat_on(view, "d1", prefill_blocks=27)
    for name, decode in (("d1", "d1"), ("d0", None), ("nobody", None)):
        asked = demand(480, local_tokens=64, answered_by=name)
        chosen = predicted_latency(view, asked, 0.0, rng)
        assert (chosen.decode if chosen.prefill is None else None) == decode


@pytest.mark.parametrize("others", [1, 20, 100])
def test_a_colocated_worker_that_answered_the_last_turn_is_first_among_equals(
    rng: random.Random, others: int
) -> None:
    """It may have the block that the answer ended in, of which nobody is told."""
    view = make_view(**{f"c{i}": Role.COLOCATED for i in range(1 + others)})
    asked = demand(1600, answered_by="c0")
    blocks = list(asked.block_hashes)

    def chosen() -> set[str]:
        return {predicted_latency(view, asked, 0.0, rng).decode for _ in range(30)}

    assert len(chosen()) > 1, "it has nothing of it any more"
    for name in view.workers:
        cache(view, name, blocks[:10])
    assert chosen() == {"c0"}
    report(view, "c0", queued_tokens=100)
    assert "c0" not in chosen(), "the wait is longer than what it may have"
    report(view, "c0")
    cache(view, "c1", blocks[:11])
    assert "c1" in chosen()


def test_a_crowded_decode_worker_is_left_for_another(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(480, local_tokens=64)
    chat_on(view, "d1")
    for name in ("d0", "d1"):
        report(view, name, step_base_s=0.01, step_per_sequence_s=0.001)
    report(view, "d1", running=40, step_base_s=0.01, step_per_sequence_s=0.001)
    placement = predicted_latency(view, asked, 0.0, rng)
    assert placement.prefill is not None and placement.decode == "d0"
    report(view, "d1", free_blocks=2)  # nor where there is no room for the rest
    assert predicted_latency(view, asked, 0.0, rng).prefill is not None
