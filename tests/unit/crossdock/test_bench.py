from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator

import pytest
from fake_server import FakeServer

from crossdock.bench.load import (
    Arrival,
    EndpointError,
    Job,
    closed_loop,
    open_endpoint,
    open_loop,
    read_openai_event,
    send,
    server_sent_events,
)
from crossdock.bench.metrics import (
    RequestRecord,
    Run,
    count_errors,
    explain,
    meets,
    parse_slo,
    percentile,
    summarize,
)
from crossdock.bench.run import BenchConfig, prepare, rows, run_bench
from crossdock.proto.errors import InvalidRequest, Overloaded


def record(index: int = 0, **fields: object) -> RequestRecord:
    """Sent at 1 s; tokens at 3, 3.5 and 4.5 s; ended at 5 s."""
    given: dict[str, object] = {
        "due_s": 0.75,
        "sent_s": 1.0,
        "arrivals_s": (3.0, 3.5, 4.5),
        "finished_s": 5.0,
        "prompt_tokens": 30,
        "output_tokens": 4,
        "cached_tokens": 10,
    }
    return RequestRecord(index=index, **(given | fields))  # type: ignore[arg-type]


def test_the_metrics_of_one_request_by_hand() -> None:
    one = record()
    assert one.ttft == 2.0
    assert one.itl == [0.5, 1.0]
    assert one.tpot == 0.5  # 1.5 s over the 3 tokens after the first
    assert one.e2e == 4.0


def test_a_request_of_one_token_has_no_gap_and_no_tpot() -> None:
    one = record(arrivals_s=(3.0,), output_tokens=1)
    assert one.itl == []
    assert one.tpot is None
    assert record(arrivals_s=(), output_tokens=0).ttft is None


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 99, 7.0), ([4.0, 1.0, 3.0, 2.0], 50, 2.5), (range(101), 90, 90.0), ([0, 10], 99, 9.9)],
)
def test_percentiles_by_hand(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_run_summarized_by_hand() -> None:
    failed = record(2, error="Overloaded", message="full", finished_s=9.0, output_tokens=99)
    run = Run((record(0), record(1, sent_s=2.0, finished_s=11.0), failed), parse_slo("ttft=1.5s"))
    report = summarize(run)
    assert report["duration_s"] == 10.0  # from 1 to 11
    assert (report["requests"], report["failed"]) == (3, 1)
    assert report["request_throughput"] == pytest.approx(0.2)
    assert report["output_throughput"] == pytest.approx(0.8)  # the failed one's 99 do not count
    assert report["total_throughput"] == pytest.approx(6.8)
    assert report["hit_rate"] == pytest.approx(20 / 60)
    assert report["tokens_per_chunk"] == pytest.approx(8 / 6)
    assert report["max_send_lag_s"] == pytest.approx(1.25)
    assert report["goodput"] == pytest.approx(0.1)  # TTFT 2 s and 1 s: one is good
    assert report["slo_attainment"] == pytest.approx(1 / 3)
    assert report["ttft_s"] == {"mean": 1.5, "p50": 1.5, "p90": 1.9, "p99": 1.99, "max": 2.0}
    assert report["itl_s"]["p50"] == pytest.approx(0.75)  # type: ignore[index]


def test_goodput_is_reported_only_under_an_slo_and_latency_only_with_samples() -> None:
    report = summarize(Run((record(error="Timeout", message="late"),)))
    assert "goodput" not in report
    assert "ttft_s" not in report
    assert report["request_throughput"] == 0.0


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ("ttft=2s", True),
        ("ttft=1999ms", False),
        ("itl=1", True),
        ("itl=0.9", False),  # its largest gap counts
        ("ttft=3,tpot=500ms,e2e=4s", True),
        ("ttft=3,tpot=499ms", False),
        ("", True),
    ],
)
def test_slo_bounds(slo: str, good: bool) -> None:
    assert meets(record(), parse_slo(slo)) is good


@pytest.mark.parametrize("slo", ["ttft", "ttft=fast", "speed=1s", "ttft=1h", "ttft=-1s"])
def test_a_wrong_slo_is_named(slo: str) -> None:
    with pytest.raises(InvalidRequest, match="slo"):
        parse_slo(slo)


def test_errors_are_counted_by_kind_with_an_example() -> None:
    records = [record(0), *(record(i, error="Timeout", message=f"m{i}") for i in (1, 2))]
    assert count_errors(records) == {"Timeout": {"count": 2, "example": "m1"}}


def test_every_reported_number_has_one_formula() -> None:
    named = [name for name, _ in explain()]
    assert len(named) == len(set(named))
    reported = summarize(Run((record(),), parse_slo("ttft=1s")))
    assert {name.removesuffix("_s") for name in reported} == {n.removesuffix("_s") for n in named}


@pytest.mark.parametrize(
    "fields",
    [
        {"rate": 1.0, "concurrency": 2},
        {"rate": -1.0},
        {"rate": math.nan},
        {"trace": "x", "rate": 1.0},
        {"trace": "x", "synthetic": True},
        {"input_tokens": (5, 4)},
        {"output_tokens": (0, 4)},
        {"token_range": (5, 5)},
        {"style": "poem"},
        {"slo": "ttft"},
        {"timeout_s": 0.0},
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        BenchConfig(**fields)  # type: ignore[arg-type]


def test_preparing_is_deterministic() -> None:
    config = BenchConfig(num_requests=5, rate=3.0, seed=4)
    assert prepare(config) == prepare(config)
    assert prepare(config)[0] != prepare(BenchConfig(num_requests=5, rate=3.0, seed=5))[0]


class Scripted:
    """An endpoint of three chunks; fails where told to."""

    def __init__(self, failing: frozenset[int] = frozenset()) -> None:
        self.failing = failing
        self.active = self.most = 0
        self.seen: list[int] = []

    async def stream(self, job: Job) -> AsyncIterator[Arrival]:
        self.seen.append(job.index)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            if job.index in self.failing:
                raise Overloaded("full")
            yield Arrival(True, 1)
            await asyncio.sleep(0)  # the others' turn
            yield Arrival(True, 3)
            yield Arrival(False, 3, prompt_tokens=9, cached_tokens=4)
        finally:
            self.active -= 1

    async def close(self) -> None:
        self.seen.append(-1)


def jobs(count: int, output_tokens: int = 3) -> list[Job]:
    return [Job(i, 0.001 * i, (1, 2), "", output_tokens) for i in range(count)]


async def test_closed_loop_sends_all_and_keeps_its_bound() -> None:
    endpoint = Scripted()
    records = await closed_loop(endpoint, jobs(20), concurrency=4)
    assert [each.index for each in records] == list(range(20))
    assert endpoint.most == 4
    assert {(r.prompt_tokens, r.output_tokens, r.cached_tokens) for r in records} == {(9, 3, 4)}
    assert {len(r.arrivals_s) for r in records} == {2}


async def test_open_loop_sends_no_request_before_its_time() -> None:
    records = await open_loop(Scripted(), jobs(10))
    assert all(each.sent_s >= each.due_s for each in records)


async def test_nothing_is_sent_after_the_duration() -> None:
    endpoint = Scripted()
    assert len(await open_loop(endpoint, jobs(10), duration_s=0.0035)) == 4
    assert await closed_loop(endpoint, jobs(10), 2, duration_s=1e-9) == []


async def test_failures_are_records() -> None:
    records = await closed_loop(Scripted(frozenset({1})), jobs(3), concurrency=1)
    assert [each.error for each in records] == ["", "Overloaded", ""]


async def test_a_stream_of_the_wrong_length_is_a_failure() -> None:
    ended = await send(Scripted(), jobs(1, output_tokens=5)[0], 0.0)
    assert ended.error == "WrongLength"
    assert "3 tokens came, 5" in ended.message


async def test_a_warm_up_that_fails_stops_the_bench_and_closes() -> None:
    endpoint = Scripted(frozenset({0}))
    with pytest.raises(ConnectionError, match="Overloaded"):
        await run_bench(BenchConfig(num_requests=3), endpoint=endpoint)
    assert endpoint.seen == [0, -1]


async def lines(*texts: bytes) -> AsyncIterator[bytes]:
    for text in texts:
        yield text


async def test_server_sent_events() -> None:
    stream = lines(
        b": note\n", b"data: a\r\n", b"\r\n", b"data:b\n", b"data: c\n", b"\n", b"data: d"
    )
    assert [event async for event in server_sent_events(stream)] == ["a", "b\nc", "d"]


def test_openai_events() -> None:
    assert read_openai_event({"choices": [{"text": "x"}]}) == Arrival(True)
    assert read_openai_event({"choices": [{"delta": {"role": "assistant"}}]}) == Arrival(False)
    assert read_openai_event({"choices": [{"delta": {"content": "x"}}]}) == Arrival(True)
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}
    assert read_openai_event({"choices": [], "usage": usage}) == Arrival(False, 2, 5, 0)
    with pytest.raises(EndpointError, match="full"):
        read_openai_event({"error": {"message": "full", "type": "overloaded"}})


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://x", "grpc://", ""])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(InvalidRequest, match="endpoint"):
        open_endpoint(url, "", 1.0)


@pytest.fixture
def gateway() -> Iterator[FakeServer]:
    with FakeServer(tokens_per_chunk=2, cached_tokens=8) as server:
        yield server


async def test_bench_of_a_grpc_endpoint(gateway: FakeServer) -> None:
    config = BenchConfig(
        endpoint=f"grpc://{gateway.target}",
        num_requests=6,
        concurrency=3,
        input_tokens=(16, 16),
        output_tokens=(5, 5),
        slo="ttft=60s",
        warmup=1,
    )
    report = await run_bench(config)
    assert report.failed == 0
    assert report.results["output_tokens"] == 30
    assert report.results["hit_rate"] == 0.5
    assert report.results["tokens_per_chunk"] == pytest.approx(5 / 3)
    assert report.results["slo_attainment"] == 1.0
    assert len(gateway.requests) == 7
    asked = gateway.requests[-1]
    assert asked.sampling.ignore_eos
    assert asked.sampling.max_tokens == 5
    assert len(asked.token_ids.ids) == 16
    whole = json.loads(json.dumps(report.to_json(with_requests=True)))
    assert whole["machine"]["cores"] >= 1
    assert whole["config"]["concurrency"] == 3
    assert len(whole["requests"]) == 6
    assert set(whole["results"]) - {"ttft_s", "itl_s", "tpot_s", "e2e_s"} <= set(whole["formulas"])
    totals, latencies = rows(report)
    assert ["requests", "6"] in totals
    assert [row[0] for row in latencies] == ["ttft", "itl", "tpot", "e2e"]


@pytest.mark.parametrize("style", ["text", "ids", "chat"])
async def test_bench_of_an_openai_endpoint(gateway: FakeServer, style: str) -> None:
    config = BenchConfig(
        endpoint=gateway.url, num_requests=3, style=style, input_tokens=(16, 16), warmup=0
    )
    report = await run_bench(config)
    assert report.failed == 0
    assert report.results["output_tokens"] == 96  # counted by usage: chunks carry two each
    assert report.results["tokens_per_chunk"] == 2.0
    assert report.results["prompt_tokens"] == 33
    body = gateway.http_bodies[0]
    assert body["stream_options"] == {"include_usage": True}
    shown = body["messages"][0]["content"] if style == "chat" else body["prompt"]
    assert len(shown if style == "ids" else shown.split()) == 16


async def test_an_http_error_is_counted_by_its_status(gateway: FakeServer) -> None:
    config = BenchConfig(endpoint=gateway.url, model="other", num_requests=2, warmup=0)
    report = await run_bench(config)
    assert report.failed == 2
    assert report.to_json()["errors"]["HTTP 404"]["count"] == 2
