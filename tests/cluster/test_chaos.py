"""Faults at every life-cycle event of a real cluster's requests, and how they are counted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_fault_at_any_event_costs_a_token_a_request_or_a_block() -> None:
    """What depends on the machine's speed is printed, not asserted. The engine is simulated, since
    each of some hundred starts of a worker would load torch and a model; all else is real."""
    import chaos

    options = ["--seed", "1", "--hang-s", "180", "--model", "simulated"]
    outcome = chaos.run(chaos.parse(options))
    print(*outcome.lines(), *outcome.slow(), sep="\n")
    assert not outcome.failures(), "\n".join([*outcome.failures()[:20], *outcome.lines()])


# -- the counting -------------------------------------------------------------------------------

PREFILL, DECODE = "prefill-0", "decode-0"
LINES = f"""\
1000000000 70 started {PREFILL} prefill@aa
1000000000 80 started {DECODE} decode@bb
2000000000 60 connected {PREFILL} aa
2000000000 60 connected {DECODE} bb
3000000000 60 received r1 -
3010000000 60 held r1 g-1@{PREFILL}
3020000000 60 routed r1 -
3100000000 70 prefill_queued g-1 -
3300000000 70 ticket_offered g-1 -
3400000000 60 delivered r1 -
3410000000 60 held r1 g-1@{DECODE}
3500000000 80 decode_queued g-1 cafe
3600000000 80 pulled cafe -
3700000000 80 joined g-1 -
3800000000 60 released r1 g-1@{PREFILL}
5000000000 60 disconnected {DECODE} bb
9000000000 90 started {DECODE} decode@cc
9500000000 60 connected {DECODE} cc
""".splitlines()


@pytest.fixture
def journal(tmp_path: Path):
    from chaos_journal import Journal

    journal = Journal(tmp_path / "journal")
    journal.take(LINES)
    return journal


def kill(at: float, worker: str, **fields):
    from chaos_faults import Kind, Planned, Struck

    planned = Planned(Kind.KILL, fields.pop("event", "joined"), worker.partition("-")[0])
    return Struck(planned, at, "r1", worker, **fields)


def seen(token_ids: list[int], end: str = "finished", times: list[float] | None = None):
    from chaos_report import Asked, End

    return Asked("r1", 0, 0.0, token_ids, times or [0.0] * len(token_ids), End(end))


def test_a_journal_tells_states_and_holders_at_any_moment(journal) -> None:
    life = journal.lives["r1"]
    times = (2.9, 3.0, 3.05, 3.45, 3.65, 99.0)
    states = ["", "received", "routed", "delivered", "pulled", "joined"]
    assert [life.state(at) for at in times] == states
    held = [journal.held_by(PREFILL, at) + journal.held_by(DECODE, at) for at in (3.0, 3.7, 3.9)]
    assert held == [[], ["r1", "r1"], ["r1"]]
    assert journal.request_of("cafe") == journal.request_of("g-1") == "r1"
    assert [worker.pid for worker in journal.ready("decode")] == [90]


def test_a_journal_is_read_on_where_it_ended_even_within_a_line(tmp_path: Path) -> None:
    from chaos_journal import Journal

    path, text = tmp_path / "journal", "\n".join(LINES) + "\n"
    path.write_text(text[:125])
    journal = Journal(path)
    journal.refresh()
    with path.open("a") as file:
        file.write(text[125:])
    journal.refresh()
    assert journal.lives["r1"].state(99.0) == "joined" and len(journal.workers) == 3


def test_recovery_is_from_the_kill_to_the_next_token_of_what_the_victim_held(journal) -> None:
    from chaos_report import recoveries, starts, struck_states

    struck = [kill(4.0, DECODE), kill(4.0, PREFILL), kill(3.75, PREFILL, spare=False)]
    found = recoveries(struck, [seen([1, 2, 3], times=[3.4, 3.8, 6.5])], journal)
    assert [(round(r.seconds, 3), r.spare, r.state) for r in found] == [
        (2.5, True, "joined"),
        (0.05, False, "joined"),
    ]
    assert starts(struck, journal) == [("decode", 5.5)]
    assert struck_states(struck, journal)["kill"] == Counter({"joined": 3})


def test_a_request_that_stands_still_in_one_process_may_have_gone_on_in_another(journal) -> None:
    from chaos_report import struck_states

    held = kill(3.65, PREFILL, event="ticket_offered")
    second = kill(3.65, PREFILL, event="ticket_offered", aimed=False)
    expected = Counter({"ticket_offered": 1, "pulled": 2})
    assert struck_states([held, second], journal)["kill"] == expected


@pytest.mark.parametrize(
    ("token_ids", "end", "expected"),
    [
        ([5, 6, 7], "finished", ("equal", -1)),
        ([5, 6], "aborted", ("equal", -1)),
        ([5, 6], "finished", ("wrong", 2)),  # too short for one that finished
        ([5, 6, 7, 8], "aborted", ("wrong", 3)),
        ([9, 6, 7], "finished", ("tie", 0)),  # 9 was as likely as 5
        ([8, 6, 7], "finished", ("wrong", 0)),  # and 8 was not
        ([5, 9, 7], "aborted", ("wrong", 1)),  # 9 was second, by more than a tie
    ],
)
def test_a_difference_is_a_tie_only_where_it_is_shown_to_be_one(token_ids, end, expected) -> None:
    from chaos_report import Undisturbed, compare

    top = (((5, -1.0), (9, -1.0009)), ((6, -1.0), (9, -1.1)), ((7, -1.0), (1, -2.0)))
    verdict, at = compare(seen(token_ids, end), Undisturbed((5, 6, 7), top))
    assert (verdict.value, at) == expected


def test_what_does_not_hold_is_named(journal) -> None:
    from chaos_report import Outcome, Undisturbed, Verdict

    nothing = ((),) * 3
    asked = [seen([5, 6, 7]), seen([5, 6, 8]), seen([5], "hung"), seen([], "failed")]
    outcome = Outcome(
        asked, [Undisturbed((5, 6, 7), nothing)], [], [], journal, 1, 1.0, 0.0, ["d: 1 leases"]
    )
    said = "\n".join(outcome.failures())
    for part in (
        "4 requests of 300",
        "0 faults of 100",
        "0 kills of prefill workers of 25",
        "1 requests hang",
        "1 requests failed",
        "nobody struck: kill at received",
        "the first wrong at 2",
        "d: 1 leases",
    ):
        assert part in said
    assert outcome.verdicts()[Verdict.WRONG] == 1
    assert not outcome.slow()


def test_faults_may_take_as_long_as_those_killed_take_to_start(journal) -> None:
    from chaos_report import MAX_ROUND_S, Outcome

    def outcome(seconds: float) -> Outcome:
        return Outcome([], [], [kill(4.0, DECODE)], [], journal, 0.5, seconds, 0.0, [])

    assert outcome(0.0).starting_s == 5.5
    most = MAX_ROUND_S / 2 + 5.5
    assert not outcome(most).slow()
    assert outcome(most + 1).slow() == [f"{most + 1:.0f} s of faults > {most:.0f} s"]


def test_a_plan_aims_every_kind_at_every_event_and_is_the_seeds_own() -> None:
    from chaos_faults import Kind, plan
    from chaos_journal import EVENTS, ROLES
    from chaos_report import MIN_FAULTS, MIN_KILLS

    made = plan(random.Random(1), 1)
    exact = {(p.kind, p.event, p.role) for p in made if not p.delay_s}
    assert exact >= {(k, e, r) for k in (Kind.KILL, Kind.PAUSE) for e in EVENTS for r in ROLES}
    assert exact >= {(Kind.ABORT, event, "") for event in EVENTS}
    kills = Counter(p.role for p in made if p.kind is Kind.KILL)
    assert min(kills.values()) >= MIN_KILLS and len(made) >= MIN_FAULTS
    assert made == plan(random.Random(1), 1) != plan(random.Random(2), 1)
    assert all(0.5 <= p.pause_s <= 6.0 for p in made if p.kind is Kind.PAUSE)
    assert len(plan(random.Random(1), 3)) == 3 * len(made)
    assert plan(random.Random(1), 0.5) == made[: len(made) // 2]
