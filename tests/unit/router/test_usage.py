"""What is counted of tenants: tokens, seconds, cost; as metrics and in the database."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from access_kit import complete, start_doors
from gateway_rig import Rig
from prometheus_client import CollectorRegistry

from crossdock.proto.errors import (
    BudgetSpent,
    Cancelled,
    CrossdockError,
    DeadlineExceeded,
    WorkerLost,
)
from crossdock.router.config import Price
from crossdock.router.dispatch.request import Ended, EndedSequence
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.usage import LABELLED, OTHERS, Usage, read_usage, usage_file

ACME = Principal("acme", "k", account="key k")
NOON = 1_795_348_800.0


def sequence(index: int, generated: int, cached: int = 0) -> EndedSequence:
    return EndedSequence(index, 100, cached, [1] * generated, None, "p", "d", {}, 2.0, 1.0)


def test_each_prompt_counts_once() -> None:
    ended = Ended(
        None, 1.0, 2, [sequence(0, 5), sequence(1, 7, 96), sequence(2, 1), sequence(3, 2)]
    )
    assert (ended.prompt_tokens, ended.cached_tokens, ended.generated_tokens) == (200, 0, 15)


def test_what_is_to_be_sent_again_costs_nothing() -> None:
    ended = Ended(WorkerLost("gone"), 1.0, 1, [sequence(0, 5)])
    assert (ended.prompt_tokens, ended.generated_tokens) == (0, 0)
    none = Ended(None, 1.0, 1, [sequence(0, 0)])
    assert none.prompt_tokens == 0, "nothing came"


@pytest.mark.parametrize("error", [Cancelled("gone"), DeadlineExceeded("too late")])
def test_who_gives_up_is_charged_the_prompts_that_were_started(error: CrossdockError) -> None:
    started = [replace(sequence(i, 0, 32), started=i < 3) for i in range(4)]
    ended = Ended(error, 1.0, 2, started)
    assert (ended.prompt_tokens, ended.cached_tokens, ended.generated_tokens) == (200, 64, 0)
    ended = Ended(error, 1.0, 2, [replace(each, started=each.index < 2) for each in started])
    assert ended.prompt_tokens == 100, "of the second prompt nothing was started"
    assert Ended(CrossdockError("broken"), 1.0, 2, started).prompt_tokens == 0


async def test_gateways_add_to_the_same_rows(tmp_path: Path) -> None:
    file = usage_file(tmp_path, "c")
    for _ in range(2):  # two gateways, or two lives of one
        usage = Usage(file, CollectorRegistry(), lambda: NOON)
        usage.add(ACME, "m", Ended(None, 1.0, 1, [sequence(0, 5, 64)]), 1.5)
        await usage.flush()
        usage.add(ACME, "m", Ended(None, 1.0, 1, [sequence(0, 5)]), 1.0)
        await usage.flush()
    (row, amounts), *more = read_usage(file).items()
    assert not more and row == ("2026-11-22", "acme", "key k", "m")
    assert (amounts.requests, amounts.prompt_tokens, amounts.cached_tokens) == (4, 400, 128)
    assert (amounts.worker_seconds, amounts.gpu_seconds, amounts.cost) == (8, 4, 5)
    assert usage.spent("key k", "2026-11-01") == 5
    assert usage.spent("key k", "2026-11-23") == 0
    assert read_usage(file, since="2026-11-23") == {}


async def test_what_the_database_does_not_take_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    from crossdock.router.frontdoor import usage as module

    file = usage_file(tmp_path, "c")
    usage = Usage(file, CollectorRegistry())
    usage.add(ACME, "m", Ended(None, 1.0, 1, [sequence(0, 5)]), 2.0)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "add_rows", full)
        await usage.flush()
    usage.add(ACME, "m", Ended(None, 1.0, 1, [sequence(0, 5)]), 3.0)
    await usage.flush()
    assert [amounts.cost for amounts in read_usage(file).values()] == [5.0]


def test_labels_are_bounded() -> None:
    registry = CollectorRegistry()
    usage = Usage(None, registry)
    for i in range(LABELLED + 50):
        usage.add(Principal(f"t{i}"), "m", Ended(None, 1.0, 1, [sequence(0, 5)]), 0.0)

    def tokens(tenant: str) -> float | None:
        labels = {"tenant": tenant, "model": "m"}
        return registry.get_sample_value("crossdock_tenant_generated_tokens_total", labels)

    assert tokens("t3") == 5
    assert tokens(f"t{LABELLED + 3}") is None
    assert tokens(OTHERS) == 250


async def test_a_gateway_counts_by_tenant(tiny_model: Path, tmp_path: Path, model: str) -> None:
    prices = {model: Price(input=1e6, cached=1e5, output=2e6)}
    home = tmp_path / "home"
    kept: Any = {"home": home, "cluster": "c", "prices": prices}
    async with start_doors(tiny_model, tmp_path, **kept) as doors:
        a, b = doors.key("a"), doors.key("b", limits={"budget": 500})
        await doors.known(b)
        rig = doors.rig
        for _ in range(2):
            assert (await complete(rig, a)).status == 200
        assert (await complete(rig, b, n=2)).status == 200
        assert (await complete(rig, b, top_p=9)).status == 400
        assert tenant(rig, "prompt_tokens", "a", model) == 80
        assert tenant(rig, "cached_tokens", "a", model) == 32
        assert tenant(rig, "generated_tokens", "b", model) == 4
        assert tenant(rig, "requests", "b", model) == 1
        assert tenant(rig, "worker_seconds", "b", model) > 0
        assert tenant(rig, "cost", "a", model) == pytest.approx(48 + 3.2 + 8)
    rows = read_usage(usage_file(home, "c"))
    assert {row[1]: amounts.cost for row, amounts in rows.items()} == {
        "a": pytest.approx(59.2),
        "b": pytest.approx(48),
    }
    again = tmp_path / "again"
    again.mkdir()
    async with start_doors(tiny_model, again, **kept) as doors:  # spend outlives a gateway
        spent = doors.rig.gateway._gate.limiter._spent
        assert spent(next(row[2] for row in rows if row[1] == "b"), "2000-01-01") == 48
    assert issubclass(BudgetSpent, Exception)


def tenant(rig: Rig, name: str, who: str, model: str) -> float:
    return rig.metric(f"tenant_{name}_total", tenant=who, model=model)
