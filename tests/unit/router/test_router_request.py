"""What stands between dispatcher and reader: the stream of deltas, and admission."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from crossdock.proto.errors import ConfigError, InvalidRequest, Overloaded, WorkerLost
from crossdock.proto.types import FinishReason, SamplingParams
from crossdock.router.dispatch.admission import Admission, Limits
from crossdock.router.dispatch.deadlines import MOST_PART, Deadlines
from crossdock.router.dispatch.request import Delta, Request, ResponseStream
from crossdock.router.placement.view import ClusterView


def stream() -> tuple[ResponseStream, list[str]]:
    closed: list[str] = []
    return ResponseStream(lambda: closed.append("closed")), closed


async def test_a_reader_that_waits_gets_each_delta() -> None:
    made, _ = stream()
    reader = asyncio.ensure_future(made.batch())
    await asyncio.sleep(0)
    made.push(Delta(0, "a", [1]))
    assert [(d.index, d.text, d.token_ids) for d in await reader] == [(0, "a", [1])]


async def test_a_reader_that_falls_behind_gets_each_index_merged() -> None:
    made, _ = stream()
    for token in range(3):
        made.push(Delta(0, str(token), [token]))
        made.push(Delta(1, "x", [7]))
    made.push(Delta(0, "!", [9], finish_reason=FinishReason.STOP, stop_reason="9"))
    first, second = await made.batch()
    assert (first.text, first.token_ids) == ("012!", [0, 1, 2, 9])
    assert (first.finish_reason, first.stop_reason) == (FinishReason.STOP, "9")
    assert (second.text, second.token_ids, second.finish_reason) == ("xxx", [7, 7, 7], None)


async def test_what_came_before_an_error_is_read_before_it() -> None:
    made, _ = stream()
    made.push(Delta(0, "a", [1]))
    made.end(WorkerLost("gone"))
    assert len(await made.batch()) == 1
    with pytest.raises(WorkerLost):
        await made.batch()


async def test_the_end_is_an_empty_batch() -> None:
    made, _ = stream()
    reader = asyncio.ensure_future(made.batch())
    await asyncio.sleep(0)
    made.end()
    assert await reader == []
    assert [d async for d in made] == []


def test_closing_matters_until_the_end() -> None:
    made, closed = stream()
    made.close()
    assert closed == ["closed"]
    ended, closed = stream()
    ended.end()
    ended.close()
    assert closed == []


def test_admission_counts_sequences_of_all_and_of_each_tenant() -> None:
    admission = Admission(Limits(max_active=5, max_active_per_tenant=3, max_request_share=1))
    admission.admit("a", 3, lambda: 1.0)
    with pytest.raises(Overloaded, match="max_active_per_tenant = 3") as refused:
        admission.admit("a", 1, lambda: 7.0)
    assert refused.value.retry_after_s == 7.0
    admission.admit("b", 2, lambda: 1.0)
    with pytest.raises(Overloaded, match="max_active = 5"):
        admission.admit("c", 1, lambda: 1.0)
    assert admission.active == 5, "refusals count nothing"
    admission.release("a", 3)
    admission.admit("a", 3, lambda: 1.0)
    admission.release("a", 3)
    admission.release("b", 2)
    assert admission.active == 0


@pytest.mark.parametrize(("of_all", "of_each"), [(3, 512), (1024, 3)])
def test_what_is_never_admitted_is_not_to_be_tried_again(of_all: int, of_each: int) -> None:
    """Clients would send it every second for ever."""
    admission = Admission(
        Limits(max_active=of_all, max_active_per_tenant=of_each, max_request_share=1)
    )
    admission.admit("a", 2, lambda: 1.0)
    with pytest.raises(InvalidRequest, match=r"^n: '4 sequences \(prompts × n\)' .* at most 3"):
        admission.admit("a", 4, lambda: 1.0)
    assert admission.active == 2
    with pytest.raises(Overloaded):
        admission.admit("a", 3, lambda: 1.0)


@pytest.mark.parametrize("field", ["max_active", "max_active_per_tenant", "worker_wait_s"])
def test_limits_that_cannot_be(field: str) -> None:
    with pytest.raises(ConfigError, match=f"gateway.limits.{field}"):
        Limits(**{field: -1})  # type: ignore[arg-type]


def test_a_deadline_that_is_predicted_to_be_missed_is_refused_and_told_when_to_come() -> None:
    request = Request("r", [[1]], SamplingParams(), 0.0, 0.0, deadline=10.0)
    deadlines = Deadlines(ClusterView())
    deadlines.part = 1.0
    deadlines.check(request, 9.0, now=1.0)
    told = r"predicted in 9\.10 s, after the deadline in 9\.0 s"
    with pytest.raises(Overloaded, match=told) as refused:
        deadlines.check(request, 9.1, now=1.0)
    assert refused.value.retry_after_s == 1.0
    with pytest.raises(Overloaded) as refused:
        deadlines.check(request, 14.0, now=1.0)
    assert refused.value.retry_after_s == 5.0, "then it would come in time"


def test_how_much_quicker_things_come_than_predicted_is_learned() -> None:
    deadlines = Deadlines(ClusterView())

    def came(took_s: float, predicted_s: float) -> None:
        request = Request("r", [[1]], SamplingParams(), 0.0, 0.0, deadline=10.0)
        sequence = SimpleNamespace(active=SimpleNamespace(request=request))
        sequence.predicted = 0.0, predicted_s
        deadlines.learn(sequence, took_s)  # type: ignore[arg-type]

    for _ in range(300):
        came(4.5, 9.0)
    assert deadlines.part == pytest.approx(0.5, rel=0.05)
    for _ in range(300):
        came(0.1, 1.0)
    assert deadlines.part == pytest.approx(0.5, rel=0.05), "far from its deadline: says nothing"
    for _ in range(400):  # an improbable ratio moves it by QUANTILE of a step each time
        came(9.0, 9.0)
    assert deadlines.part == MOST_PART
