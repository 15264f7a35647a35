"""What a gateway knows of its workers: load, bandwidths, incarnations, pairs that back off."""

from __future__ import annotations

import pytest
from view_kit import BLOCK, add, cache, connect, demand, make_view, report, two_and_two

from crossdock.proto.types import Role
from crossdock.router.placement.pairs import DEFAULT_BANDWIDTH, PAIR_BACK_OFF_S
from crossdock.router.placement.view import REPLACED_WITHIN_S, ClusterView
from crossdock.router.placement.workers import SEEN_AFTER_S, LoadReport, WorkerFacts


def test_a_pair_that_was_never_measured_is_presumed_as_good_as_the_best() -> None:
    view = two_and_two()
    view.transferred("p0", "d0", nbytes=10**10, seconds=1.0)
    assert view.pairs.bandwidth("p1", "d1") == pytest.approx(1e10)
    view.transferred("p0", "d1", nbytes=10**7, seconds=1.0)
    assert view.pairs.bandwidth("p1", "d1") == pytest.approx(1e10, rel=0.02)
    view.transferred("p1", "d0", nbytes=2 * 10**10, seconds=1.0)
    assert view.pairs.bandwidth("p1", "d1") == pytest.approx(2e10)
    for _ in range(1000):
        view.transferred("p1", "d0", nbytes=10**8, seconds=1.0)  # all are slow now
    assert view.pairs.bandwidth("p1", "d1") == pytest.approx(1e8, rel=0.05)


def test_bandwidth_follows_the_bytes_not_the_number_of_pulls() -> None:
    view = make_view(p0=Role.PREFILL, d0=Role.DECODE)
    view.transferred("p0", "d0", nbytes=10**9, seconds=1.0)
    view.transferred("p0", "d0", nbytes=1000, seconds=0.001)  # 1 MB/s, being all latency
    assert view.pairs.bandwidth("p0", "d0") == pytest.approx(1e9, rel=0.01)
    for _ in range(30):
        view.transferred("p0", "d0", nbytes=10**8, seconds=1.0)
    assert view.pairs.bandwidth("p0", "d0") == pytest.approx(1e8, rel=0.05)
    view.transferred("p0", "d0", nbytes=0, seconds=1.0)
    view.disconnected("d0", "d0-incarnation")
    assert view.pairs.bandwidth("p0", "d0") > 5e8, "its successor is presumed as good as any"


def test_work_counts_until_a_report_can_have_seen_it() -> None:
    view = make_view(p0=Role.PREFILL)
    worker = view.workers["p0"]
    view.place("p0", "s", 300, 20)
    report(view, "p0", now=10.0)
    assert worker.queued_tokens == 300, "reserved, not sent: no report can have seen it"
    view.sent("p0", "s", 10.0)
    report(view, "p0", now=10.0 + SEEN_AFTER_S / 2)
    assert (worker.queued_tokens, worker.sequences, worker.available_blocks) == (300, 1, 980)
    report(view, "p0", now=10.0 + SEEN_AFTER_S, queued_tokens=280)
    assert (worker.queued_tokens, worker.sequences, worker.available_blocks) == (280, 0, 1000)
    view.place("p0", "t", 50, 4)
    view.unplace("p0", "t")
    assert worker.queued_tokens == 280


def test_a_load_from_before_a_step_has_not_seen_what_came_during_it() -> None:
    view = make_view(p0=Role.PREFILL)
    worker = view.workers["p0"]
    view.place("p0", "s", 300, 20)
    view.sent("p0", "s", 10.0)
    report(view, "p0", now=11.0, age_s=1.2)  # a heartbeat repeats what the engine told at 9.8
    assert worker.queued_tokens == 300
    report(view, "p0", now=11.5, age_s=0.1, queued_tokens=280)
    assert worker.queued_tokens == 280


def test_who_has_work_is_left_out_after_less_silence() -> None:
    """It tells of each step; a process that was stopped cannot say that it is late."""
    view = make_view(p0=Role.PREFILL, p1=Role.PREFILL)
    view.place("p0", "s", 300, 20)

    def usable(now: float) -> list[str]:
        return [worker.name for worker in view.usable(Role.PREFILL, now)]

    assert usable(1.3) == ["p0", "p1"], "the heartbeat of a long step"
    assert usable(1.6) == ["p1"]
    report(view, "p0", now=1.7)
    assert usable(1.8) == ["p0", "p1"]
    assert usable(4.3) == ["p0", "p1"], "all are silent: whoever is there"


def test_an_incarnation_replaces_the_one_before_it() -> None:
    view = make_view(p0=Role.PREFILL)
    cache(view, "p0", [b"old"])
    facts = WorkerFacts("p0", Role.PREFILL, "second", 1000, BLOCK, 1000)
    view.connected(facts, 1.0)
    assert view.index.depths([b"old"]) == {}
    view.disconnected("p0", "p0-incarnation")  # the old stream's end, noticed late
    assert "p0" in view.workers
    view.disconnected("p0", "second")
    assert not view.workers


def test_a_report_of_an_incarnation_that_was_replaced_is_nobodys() -> None:
    view = make_view(p0=Role.PREFILL)
    old = view.workers["p0"]
    view.connected(WorkerFacts("p0", Role.PREFILL, "second", 1000, BLOCK, 1000), 1.0)
    view.reported(old, LoadReport(queued_tokens=500), 1.0)
    assert view.columns(Role.PREFILL).numbers.queued_tokens.tolist() == [0.0]
    assert view.workers["p0"].queued_tokens == 0


def test_slots_are_used_again() -> None:
    view = make_view(a=Role.PREFILL, b=Role.PREFILL)
    view.disconnected("a", "a-incarnation")
    add(view, "c", Role.DECODE)
    add(view, "d", Role.DECODE)
    assert sorted(w.slot for w in view.workers.values()) == [0, 1, 2]


def test_a_worker_that_is_replaced_still_counts_in_what_may_be_asked() -> None:
    view = make_view(d0=Role.DECODE)
    connect(view, "p0", Role.PREFILL, num_blocks=900)
    connect(view, "p1", Role.PREFILL, num_blocks=10)
    view.disconnected("p0", "p0-incarnation")
    assert view.pool_tokens(REPLACED_WITHIN_S - 1) == 900 * BLOCK, "what needs it waits for it"
    assert view.pool_tokens(REPLACED_WITHIN_S + 1) == 10 * BLOCK
    connect(view, "p0", Role.PREFILL, num_blocks=20)
    assert view.pool_tokens(1.0) == 20 * BLOCK


def test_the_pool_bound_is_of_the_best_path() -> None:
    view = ClusterView()
    assert view.pool_tokens(0.0) is None
    for name, role, blocks in (
        ("p0", Role.PREFILL, 100), ("p1", Role.PREFILL, 50), ("d0", Role.DECODE, 70)
    ):  # fmt: skip
        view.connected(WorkerFacts(name, role, name, blocks, BLOCK, 1), 0.0)
    assert view.pool_tokens(0.0) == 70 * BLOCK
    view.connected(WorkerFacts("c0", Role.COLOCATED, "c0", 90, BLOCK, 1), 0.0)
    assert view.pool_tokens(0.0) == 90 * BLOCK


def test_pulls_from_a_worker_that_is_gone_say_nothing_of_its_successor() -> None:
    """Names come back, incarnations do not; what nobody forgets any more would stay for good."""
    view = two_and_two()
    view.disconnected("p0", "p0-incarnation")
    view.pull_failed("p0", "d0", 0.0)
    view.transferred("p0", "d0", 1000, 1.0)
    assert not view.pairs.any_backs_off and not view.pairs.backs_off("p0", "d0", 0.0)
    assert view.pairs.bandwidth("p0", "d0") == pytest.approx(DEFAULT_BANDWIDTH)


def test_a_pair_backs_off_longer_each_time_until_a_pull_succeeds() -> None:
    view = two_and_two()
    first, longest = PAIR_BACK_OFF_S

    def back_off_of(now: float) -> float:
        view.pull_failed("p0", "d0", now)
        view.pull_failed("p0", "d0", now)  # another that was under way: the same failure
        after = now
        while view.pairs.backs_off("p0", "d0", after):
            after += 0.25
        return after - now

    now, back_offs = 0.0, []
    for _ in range(6):
        back_offs.append(back_off_of(now))
        now += back_offs[-1]
    assert back_offs == [min(first * 2**i, longest) for i in range(6)]
    assert not view.pairs.backs_off("p1", "d0", now)
    view.transferred("p0", "d0", 0, 0.0)  # all was cached: nothing crossed the link
    assert back_off_of(now) == longest
    view.transferred("p0", "d0", 1000, 0.1)
    assert not view.pairs.backs_off("p0", "d0", now)
    assert back_off_of(now) == first
    assert back_off_of(now + 10 * longest) == first  # long ago


def test_how_busy_workers_are_and_how_long_a_prompt_takes_alone() -> None:
    view = make_view(d0=Role.DECODE)
    assert view.busy(0.0).seconds == 0.0
    for i in range(40):
        connect(view, f"p{i}", Role.PREFILL, chunk_tokens=512)
        report(view, f"p{i}", queued_tokens=100 * (i < 4), yielding_tokens=50 * (i < 2))
    begun_s = 0.05 / 2  # of a chunk that yields, half
    assert view.busy(0.0).seconds == pytest.approx((2 * (0.05 + begun_s) + 2 * 0.1) / 40)
    assert view.busy(0.0)[1:] == (pytest.approx(2 * (0.05 - begun_s) / 40), 40, 512)
    asked = demand(1600)
    assert view.alone_s(asked) == pytest.approx((1.6, 40))
    cache(view, "p39", list(asked.block_hashes[:90]))
    cache(view, "d0", list(asked.block_hashes))
    assert view.alone_s(asked) == pytest.approx((0.16, 40))
