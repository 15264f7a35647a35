"""The policy over few and over many workers, against one that looks at each worker by itself."""

from __future__ import annotations

import random

import pytest
from reference_policy import Reference
from view_history import STEPS, History

from crossdock.proto.types import Role
from crossdock.router.placement import latency
from crossdock.router.placement.demand import Demand, NoWorker, Placement
from crossdock.router.placement.latency import predicted_latency
from crossdock.router.placement.speed import PoolSpeeds


def decided(history: History, demand: Demand, dice: int) -> Placement | None:
    try:
        return predicted_latency(history.view, demand, history.now, random.Random(dice), dice)
    except NoWorker:
        return None


def test_the_arrays_have_the_numbers_of_each_worker_as_they_are_now() -> None:
    """Also of those that go by what their pool is presumed to be, after that has changed."""
    compared = 0
    for seed in range(60):
        history = History(seed)
        for _ in range(STEPS):
            history.happens()
            for role in Role:
                columns = history.view.columns(role)
                for row, worker in enumerate(columns.workers):
                    worker.changed()
                    assert tuple(each[row] for each in columns.numbers) == worker.numbers
                    compared += worker.speeds.lines != PoolSpeeds().lines
    assert compared > 1000


def test_the_choice_and_its_seconds_are_those_of_a_plain_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"disaggregated": 0, "alone": 0, "nobody": 0}
    for seed in range(60):
        history = History(seed)
        for step in range(STEPS):
            history.happens()
            asked, dice = history.demand(), 1000 * seed + step
            expected = Reference(history.view, asked, history.now, random.Random(dice)).decide()
            for many in (0, 10**9):  # in arrays, and one by one
                monkeypatch.setattr(latency, "MANY", many)
                assert decided(history, asked, dice) == expected, (seed, step, many)
            if expected is None:
                ways["nobody"] += 1
                continue
            ways["disaggregated" if expected.prefill else "alone"] += 1
            history.placed_as(expected, asked, f"s{dice}")
    assert min(ways.values()) > 20, ways
