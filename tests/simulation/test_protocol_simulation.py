"""Seeded histories of the protocol, and proof that the checks bite."""

from __future__ import annotations

from collections import Counter

import pytest
from protocol_plants import LIMIT, PLANTS, Plant, find
from protocol_sim import Simulation

SEEDS = 800
FEW_SEEDS = 20

MUST_HAPPEN = {
    "finished",
    "Cancelled",
    "DeadlineExceeded",
    "NoWorker",
    "restarted: worker lost",
    "restarted: preempted",
    "restarted: overloaded",
    "restarted: draining",
    "restarted: pull failed",
    "no hand-off",
    "scored",
    "scoring goes on elsewhere",
    "no token asked for",
    "reserved early",
    "reserved late",
    "hung up: incarnation",
    "cut: silent",
    "pull: no progress of the prompt",
    "joined",
    "killed",
    "killed, back at the same address",
    "paused",
    "given up while paused",
    "drained",
    "stream broken",
    "gateway lost",
    "peer not met",
    "notification late",
    "notification twice",
    "lease released",
    "lease expired",
    "lease revoked",
    "pull: fence refused",
    "pull: fence failed",
    "pull: read failed",
    "pull: deadline passed",
    "pull: cancelled",
    "ERROR_CODE_PREEMPTED",
    "ERROR_CODE_OVERLOADED",
    "ERROR_CODE_DRAINING",
    "ERROR_CODE_DEADLINE",
    "ERROR_CODE_PULL_FAILED",
}


@pytest.mark.slow
def test_every_history_keeps_the_invariants() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        seen += Simulation(seed).run().tally()
    assert not MUST_HAPPEN - seen.keys(), "these never happened, so they were not tested"


def test_a_few_histories_keep_the_invariants() -> None:
    seen: Counter[str] = Counter()
    for seed in range(FEW_SEEDS):
        seen += Simulation(seed).run().tally()
    assert seen.keys() >= {"finished", "joined", "killed", "lease expired"}


def test_a_seed_replays_exactly() -> None:
    first: list[str] = []
    again: list[str] = []
    Simulation(7, trace=first.append).run()
    Simulation(7, trace=again.append).run()
    assert len(first) > 60 and first == again


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    found = find(plant)
    assert found is not None, f"{LIMIT} seeds passed"
    print(f"{plant.__name__}: {found}")
