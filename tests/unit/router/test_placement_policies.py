"""Each policy's own rule, and what must hold of all of them."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from reference_policy import Reference
from view_history import History
from view_kit import BLOCK, add, cache, demand, make_view, report, two_and_two

from crossdock.proto.types import Role
from crossdock.router.placement.demand import NoWorker, Placement, Reason
from crossdock.router.placement.latency import predicted_latency
from crossdock.router.placement.peers import (
    KvCost,
    PrefixThreshold,
    least_loaded,
    round_robin,
)
from crossdock.router.placement.policy import ALIASES, POLICIES, Policies, Policy
from crossdock.router.placement.view import ClusterView

ASKED = demand(160)  # 10 blocks


def blocks(count: int) -> list[bytes]:
    return list(ASKED.block_hashes[:count])


def active(view: ClusterView, **workers: int) -> None:
    """So many blocks are of their active sequences."""
    for name, count in workers.items():
        report(view, name, free_blocks=1000 - count)


# -- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_what_every_policy_must(name: str) -> None:
    policy, kinds = Policies().named(name), Counter[str]()
    for seed in range(20):
        history = History(seed)
        for step in range(15):
            history.happens()
            asked, dice = history.demand(), 100 * seed + step
            truth = Reference(history.view, asked, history.now, random.Random(dice))
            try:
                placement = policy(history.view, asked, history.now, random.Random(dice), dice)
            except NoWorker:
                assert truth.decide() is None
                with pytest.raises(NoWorker):
                    policy(history.view, asked, history.now, random.Random(dice), dice)
                kinds["nobody"] += 1
                continue
            again = policy(history.view, asked, history.now, random.Random(dice), dice)
            assert again == placement, "the same dice, the same placement"
            kinds["pair" if placement.prefill else "alone"] += 1
            check(truth, name, placement)
            history.placed_as(placement, asked, f"s{dice}")
    assert min(kinds[kind] for kind in ("pair", "alone", "nobody")) > 10, kinds


def check(truth: Reference, name: str, placement: Placement) -> None:
    """Of usable workers those with room, and what is said of them is so."""
    workers = truth.view.workers
    worker, decode = workers[placement.prefill or placement.decode], workers[placement.decode]
    sides = {
        Role.PREFILL: truth.prefills,
        Role.DECODE: truth.decodes,
        Role.COLOCATED: truth.both,
    }
    alone = [Role.COLOCATED] if name != "predicted_latency" else [Role.COLOCATED, Role.DECODE]
    assert worker.role is Role.PREFILL if placement.prefill else worker.role in alone
    assert worker in truth.with_room(sides[worker.role])
    assert decode in sides[decode.role]
    if worker is not decode and name != "predicted_latency":
        linked = [
            each
            for each in truth.decodes
            if not truth.view.pairs.backs_off(worker.name, each.name, truth.now)
        ]
        assert decode in truth.with_room(linked or truth.decodes)
    assert placement.cached_blocks == truth.depth(worker)
    assert placement.uncached_tokens == truth.uncached(worker)
    if worker.role is not Role.DECODE:
        assert placement.predicted_ttft_s == pytest.approx(truth.ttft_s(worker))
    assert placement.reason is not None


@pytest.mark.parametrize("name", POLICIES)
def test_draining_and_avoided_workers_get_nothing_while_there_are_others(name: str) -> None:
    view = make_view(**{f"p{i}": Role.PREFILL for i in range(3)})
    for i in range(3):
        add(view, f"d{i}", Role.DECODE)
    cache(view, "p0", blocks(10))
    cache(view, "d0", blocks(10))
    report(view, "p0", draining=True)
    report(view, "d0", draining=True)
    shy = demand(160, avoid=frozenset({"p1", "d1"}))
    rng, policy = random.Random(1), Policies().named(name)
    chosen = [policy(view, shy, 0.0, rng, turn) for turn in range(20)]
    assert {(c.prefill, c.decode) for c in chosen} == {("p2", "d2")}


def test_the_older_name_is_the_same_policy() -> None:
    policies = Policies()
    assert {policies.named(old) for old in ALIASES} == {predicted_latency}
    assert policies.named("least_latency") is policies.named("predicted_latency")


# -- round_robin ------------------------------------------------------------------------------


def turns(view: ClusterView, start: int, count: int) -> tuple[Counter[str], Counter[str]]:
    """How often each computes the prompt, and each decodes after a prefill worker."""
    rng = random.Random(1)
    chosen = [round_robin(view, ASKED, 0.0, rng, start + i) for i in range(count)]
    assert {placement.reason for placement in chosen} == {Reason.IN_TURN}
    firsts = Counter(placement.prefill or placement.decode for placement in chosen)
    return firsts, Counter(placement.decode for placement in chosen if placement.prefill)


def test_turns_are_even_while_workers_come_and_go() -> None:
    view = make_view(p0=Role.PREFILL, p1=Role.PREFILL, p2=Role.PREFILL)
    add(view, "d0", Role.DECODE)
    add(view, "d1", Role.DECODE)
    assert turns(view, 1, 12) == ({"p0": 4, "p1": 4, "p2": 4}, {"d0": 6, "d1": 6})
    view.disconnected("p0", "p0-incarnation")
    assert turns(view, 13, 12) == ({"p1": 6, "p2": 6}, {"d0": 6, "d1": 6})
    add(view, "p3", Role.PREFILL)
    view.disconnected("d1", "d1-incarnation")
    assert turns(view, 25, 12) == ({"p1": 4, "p2": 4, "p3": 4}, {"d0": 12})


def test_colocated_workers_have_their_turns_beside_pairs() -> None:
    view = make_view(p0=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE, c0=Role.COLOCATED)
    assert turns(view, 1, 8) == ({"p0": 4, "c0": 4}, {"d0": 2, "d1": 2})
    add(view, "p1", Role.PREFILL)
    add(view, "c1", Role.COLOCATED)
    each = {"p0": 4, "p1": 4, "c0": 4, "c1": 4}
    assert turns(view, 1, 16) == (each, {"d0": 4, "d1": 4})


# -- least_loaded -----------------------------------------------------------------------------


def test_the_fewest_sequences_running_or_waiting(rng: random.Random) -> None:
    view = two_and_two()
    report(view, "p0", waiting=2, running=1, queued_tokens=3)
    report(view, "p1", running=2, queued_tokens=90_000)
    report(view, "d0", running=4)
    report(view, "d1", running=5)
    cache(view, "p0", blocks(10))
    placement = least_loaded(view, ASKED, 0.0, rng)
    assert (placement.prefill, placement.decode) == ("p1", "d0")
    assert placement.reason is Reason.LEAST_LOADED
    for key in ("a", "b"):  # what was placed and not counted yet counts
        view.place("p1", key, 100, 7)
    assert least_loaded(view, ASKED, 0.0, rng).prefill == "p0"


def test_of_equal_ones_any(rng: random.Random) -> None:
    view = two_and_two()
    pairs = Counter()
    for _ in range(200):
        placement = least_loaded(view, ASKED, 0.0, rng)
        pairs[placement.prefill, placement.decode] += 1
    assert len(pairs) == 4 and min(pairs.values()) > 25


def test_a_colocated_worker_is_one_of_those_that_compute(rng: random.Random) -> None:
    view = two_and_two()
    add(view, "c0", Role.COLOCATED)
    for name in ("p0", "p1"):
        report(view, name, running=1)
    placement = least_loaded(view, ASKED, 0.0, rng)
    assert (placement.prefill, placement.decode) == (None, "c0")


# -- prefix_threshold -------------------------------------------------------------------------


def test_a_prefix_decides_beyond_the_threshold(rng: random.Random) -> None:
    view, policy = two_and_two(), PrefixThreshold()
    for name in ("p0", "d0"):
        report(view, name, running=9)
        cache(view, name, blocks(3))  # 48 of 160 tokens are 0.3
    placement = policy(view, ASKED, 0.0, rng)
    assert (placement.prefill, placement.decode) == ("p1", "d1")
    assert placement.reason is Reason.SHORT_PREFIX
    for name in ("p0", "d0"):
        cache(view, name, blocks(4))
    placement = policy(view, ASKED, 0.0, rng)
    assert (placement.prefill, placement.decode) == ("p0", "d0")
    assert placement.reason is Reason.LONGEST_PREFIX
    assert PrefixThreshold(cache_threshold=0.4)(view, ASKED, 0.0, rng).prefill == "p1"


@pytest.mark.parametrize(
    ("most", "least", "balanced"),
    [(64, 0, True), (65, 0, False), (195, 130, True), (196, 130, False), (100, 60, True)],
)
def test_loads_too_far_apart_go_to_the_shortest_queue(
    rng: random.Random, most: int, least: int, balanced: bool
) -> None:
    """Both bounds must be exceeded: 64 sequences, and 1.5 times."""
    view = two_and_two()
    cache(view, "p0", blocks(10))
    report(view, "p0", waiting=most)
    report(view, "p1", waiting=least)
    placement = PrefixThreshold()(view, ASKED, 0.0, rng)
    expected = ("p0", Reason.LONGEST_PREFIX) if balanced else ("p1", Reason.IMBALANCED)
    assert (placement.prefill, placement.reason) == expected


def test_of_equal_prefixes_the_least_loaded_holder(rng: random.Random) -> None:
    view = make_view(d0=Role.DECODE, **{f"p{i}": Role.PREFILL for i in range(4)})
    for name, depth in (("p0", 5), ("p1", 8), ("p2", 8)):
        cache(view, name, blocks(depth))
    report(view, "p1", running=3)
    report(view, "p2", running=2)
    assert {PrefixThreshold()(view, ASKED, 0.0, rng).prefill for _ in range(20)} == {"p2"}
    report(view, "p1", running=2)
    assert {PrefixThreshold()(view, ASKED, 0.0, rng).prefill for _ in range(40)} == {"p1", "p2"}


# -- kv_cost ----------------------------------------------------------------------------------


def documented() -> ClusterView:
    """The example of the KV router's documentation: costs of 18, 10 and 11 blocks."""
    view = make_view(**{f"w{i}": Role.COLOCATED for i in (1, 2, 3)})
    for name, depth, decode in (("w1", 2, 10), ("w2", 5, 5), ("w3", 8, 9)):
        cache(view, name, blocks(depth))
        active(view, **{name: decode})
    return view


def test_the_least_cost_of_the_documented_example(rng: random.Random) -> None:
    view = documented()
    placement = KvCost()(view, ASKED, 0.0, rng)
    assert (placement.prefill, placement.decode) == (None, "w2")
    assert placement.reason is Reason.LEAST_COST
    assert KvCost(prefill_scale=10)(view, ASKED, 0.0, rng).decode == "w3"  # 90, 55, 29
    report(view, "w2", free_blocks=995, queued_tokens=2 * BLOCK)  # 12 now
    assert KvCost()(view, ASKED, 0.0, rng).decode == "w3"
    active(view, w1=2)
    assert KvCost(overlap_credit=0)(view, ASKED, 0.0, rng).decode == "w1"  # 12, 17, 19


def test_credit_takes_nothing_off_beyond_the_prompt(rng: random.Random) -> None:
    view = make_view(w1=Role.COLOCATED, w2=Role.COLOCATED)
    cache(view, "w1", blocks(10))
    cache(view, "w2", blocks(1))
    active(view, w1=7, w2=6)
    assert KvCost(overlap_credit=10)(view, ASKED, 0.0, rng).decode == "w2"


def test_a_pair_is_chosen_by_one_term_each(rng: random.Random) -> None:
    view = two_and_two()
    cache(view, "p0", blocks(9))
    cache(view, "d0", blocks(10))  # what decode workers hold is no credit
    active(view, p0=900, d0=50, d1=49)  # nor do prefill workers' active blocks count
    report(view, "p0", free_blocks=100, queued_tokens=7 * BLOCK)  # 8 against 10
    placement = KvCost()(view, ASKED, 0.0, rng)
    assert (placement.prefill, placement.decode) == ("p0", "d1")
    report(view, "p0", free_blocks=100, queued_tokens=10 * BLOCK)  # 11 against 10
    assert KvCost()(view, ASKED, 0.0, rng).prefill == "p1"


def test_a_colocated_worker_is_weighed_against_a_pair(rng: random.Random) -> None:
    view = two_and_two()
    add(view, "c0", Role.COLOCATED)
    active(view, d0=400, d1=300, c0=290)
    assert KvCost()(view, ASKED, 0.0, rng).decode == "c0"
    active(view, c0=310)
    placement = KvCost()(view, ASKED, 0.0, rng)
    assert placement.prefill is not None and placement.decode == "d1"


def test_equal_costs_go_to_any(rng: random.Random) -> None:
    for temperature in (0.0, 0.5):  # a softmax of equal costs too
        policy = KvCost(temperature=temperature)
        found = Counter(policy(two_and_two(), ASKED, 0.0, rng).prefill for _ in range(200))
        assert min(found["p0"], found["p1"]) > 60


def test_a_temperature_draws_by_a_softmax_of_the_costs() -> None:
    view, rng, count = documented(), random.Random(3), 3000
    placements = [KvCost(temperature=0.5)(view, ASKED, 0.0, rng) for _ in range(count)]
    found = Counter(placement.decode for placement in placements)
    weights = {"w1": math.exp(-1 / 0.5), "w2": 1.0, "w3": math.exp(-1 / 8 / 0.5)}
    for name, weight in weights.items():
        assert found[name] / count == pytest.approx(weight / sum(weights.values()), abs=0.03)
    assert {p.reason for p in placements if p.decode == "w2"} == {Reason.LEAST_COST}
    assert {p.reason for p in placements if p.decode != "w2"} == {Reason.SAMPLED_COST}
    least = KvCost(temperature=5e-324)
    assert {least(view, ASKED, 0.0, rng).decode for _ in range(20)} == {"w2"}


# -- predicted_latency ------------------------------------------------------------------------


def test_it_says_which_way_was_the_quickest(rng: random.Random) -> None:
    view = two_and_two()
    assert predicted_latency(view, ASKED, 0.0, rng).reason is Reason.QUICKEST_PAIR
    cache(view, "d1", blocks(9))
    local = demand(160, local_tokens=64)
    assert predicted_latency(view, local, 0.0, rng).reason is Reason.QUICKEST_LOCAL
    both = make_view(c0=Role.COLOCATED)
    assert predicted_latency(both, ASKED, 0.0, rng).reason is Reason.QUICKEST_COLOCATED


def test_all_have_one_signature(rng: random.Random) -> None:
    for policy in Policies().by_name.values():
        checked: Policy = policy
        assert checked(view=two_and_two(), demand=ASKED, now=0.0, rng=rng).prefill
