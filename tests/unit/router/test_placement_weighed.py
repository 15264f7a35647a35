"""What a decision went by: every candidate with its seconds by part, or the number that decided."""

from __future__ import annotations

import random

import pytest
from view_history import STEPS, History
from view_kit import BLOCK, add, cache, connect, demand, make_view, report, two_and_two

from crossdock.proto.types import Role
from crossdock.router.placement import latency
from crossdock.router.placement.demand import NoWorker, Placement
from crossdock.router.placement.latency import TIE_ABSOLUTE_S, TIE_RELATIVE, predicted_latency
from crossdock.router.placement.peers import KvCost, PrefixThreshold, least_loaded, round_robin
from crossdock.router.placement.weighed import Candidate, Parts


def parts_of(placement: Placement) -> Parts:
    assert placement.weighed is not None
    return placement.weighed.parts(placement)


def computing(placement: Placement) -> dict[str, Candidate]:
    assert placement.weighed is not None
    return {each.worker: each for each in placement.weighed.computing()}


def decoding(placement: Placement) -> dict[str, Candidate]:
    assert placement.weighed is not None
    return {each.worker: each for each in placement.weighed.decoding()}


def test_the_parts_add_up_to_what_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"disaggregated": 0, "alone": 0}
    for seed in range(40):
        history = History(seed)
        for step in range(STEPS):
            history.happens()
            asked, told = history.demand(), []
            for many in (0, 10**9):  # in arrays, and one by one
                monkeypatch.setattr(latency, "MANY", many)
                dice = random.Random(step)
                try:
                    placement = predicted_latency(history.view, asked, history.now, dice)
                except NoWorker:
                    continue
                parts, able = parts_of(placement), computing(placement)
                chosen = able[placement.prefill or placement.decode]
                assert parts.ttft == pytest.approx(placement.predicted_ttft_s)
                assert min(parts[1:]) > -1e-9
                assert chosen.cached_blocks == placement.cached_blocks
                least = min(each.all_s for each in able.values() if each.all_s is not None)
                assert least <= sum(parts) + 1e-9
                if placement.prefill is None:
                    assert sum(parts) <= least * (1 + TIE_RELATIVE) + TIE_ABSOLUTE_S + 1e-9
                    assert chosen.all_s == pytest.approx(sum(parts))
                    assert not parts.transfer
                else:
                    best = min(sum(each.parts or ()) for each in decoding(placement).values())
                    first = sum(chosen.parts or ())
                    assert chosen.all_s == pytest.approx(first + best)
                    after = decoding(placement)[placement.decode]
                    assert sum(parts) == pytest.approx(first + sum(after.parts or ()))
                ways["disaggregated" if placement.prefill else "alone"] += 1
                told.append((parts, [(n, c.cached_blocks) for n, c in sorted(able.items())]))
            if len(told) == 2 and history.most < 8:  # else any of equal ones are candidates
                assert told[0][1] == told[1][1]
                assert told[0][0] == pytest.approx(told[1][0])
    assert min(ways.values()) > 20, ways


def test_each_part_is_what_it_is_called(rng: random.Random) -> None:
    view = make_view(p0=Role.PREFILL, d0=Role.DECODE)
    asked = demand(160)
    report(view, "p0", queued_tokens=500, prefill_tokens_per_s=100.0)
    cache(view, "p0", list(asked.block_hashes[:4]))
    view.transferred("p0", "d0", nbytes=1000, seconds=0.5)
    parts = parts_of(predicted_latency(view, asked, 0.0, rng))
    assert parts.queue == pytest.approx(5.0)
    assert parts.prompt == pytest.approx((160 - 4 * BLOCK) / 100)
    assert parts.transfer == pytest.approx(10 * 0.5)
    assert parts.eviction == parts.stream == 0.0


def test_the_stream_is_more_than_on_the_best_and_so_is_what_is_evicted(rng: random.Random) -> None:
    view = make_view(p0=Role.PREFILL)
    add(view, "d0", Role.DECODE, running=9, step_base_s=0.01, step_per_sequence_s=0.01)
    add(view, "d1", Role.DECODE, running=0, step_base_s=0.01, step_per_sequence_s=0.01)
    report(view, "p0", free_blocks=0, cached_blocks=1000)
    placement = predicted_latency(view, demand(160), 0.0, rng)
    after = decoding(placement)
    assert placement.decode == "d1"
    assert after["d1"].parts is not None and after["d1"].parts.stream == 0.0
    assert after["d0"].parts is not None and after["d0"].parts.stream > 1.0
    assert parts_of(placement).eviction > 0.0


def test_a_decode_worker_that_goes_on_by_itself_is_beside_the_prefill_workers(
    rng: random.Random,
) -> None:
    view, asked = two_and_two(), demand(1600, local_tokens=128)
    cache(view, "d1", list(asked.block_hashes[:99]))
    placement = predicted_latency(view, asked, 0.0, rng)
    assert (placement.prefill, placement.decode) == (None, "d1")
    able = computing(placement)
    assert set(able) == {"p0", "p1", "d1"}
    assert able["d1"].cached_blocks == 99
    assert able["d1"].all_s < min(able[name].all_s or 0.0 for name in ("p0", "p1"))  # type: ignore[operator]


def test_it_is_of_the_time_of_the_decision(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(160)
    report(view, "p1", queued_tokens=500)
    placement = predicted_latency(view, asked, 0.0, rng)
    before = computing(placement), decoding(placement), parts_of(placement)
    for name in ("p0", "p1"):
        report(view, name, queued_tokens=9000)
        cache(view, name, list(asked.block_hashes))
    view.transferred("p0", "d0", nbytes=1000, seconds=9.0)
    assert (computing(placement), decoding(placement), parts_of(placement)) == before


def test_policies_that_predict_nothing_tell_their_numbers(rng: random.Random) -> None:
    view, asked = two_and_two(), demand(160)
    report(view, "p0", running=3)
    cache(view, "p0", list(asked.block_hashes[:9]))
    placement = least_loaded(view, asked, 0.0, rng)
    assert {n: c.number for n, c in computing(placement).items()} == {"p0": 3, "p1": 0}
    assert set(decoding(placement)) == {"d0", "d1"}
    assert parts_of(placement).ttft == pytest.approx(placement.predicted_ttft_s)
    placement = PrefixThreshold()(view, asked, 0.0, rng)
    assert {n: c.number for n, c in computing(placement).items()} == {"p0": 9, "p1": 0}
    placement = KvCost()(view, asked, 0.0, rng)
    assert computing(placement)["p0"].number == 1 and computing(placement)["p1"].number == 10
    assert not computing(round_robin(view, asked, 0.0, rng))


def test_of_many_the_best_are_told_and_the_one_that_was_chosen(rng: random.Random) -> None:
    view = make_view(d0=Role.DECODE)
    for i in range(100):
        connect(view, f"p{i}", Role.PREFILL)
        report(view, f"p{i}", queued_tokens=1600 * i)
    told = computing(predicted_latency(view, demand(160), 0.0, rng))
    assert set(told) == {f"p{i}" for i in range(8)}
    assert told["p7"].all_s is None, "far behind, it was not weighed with the decode workers"
    policy = KvCost(temperature=1e6)
    for _ in range(20):
        placement = policy(view, demand(160), 0.0, rng)
        told = computing(placement)
        assert len(told) == 8 and placement.prefill in told and "p0" in told
