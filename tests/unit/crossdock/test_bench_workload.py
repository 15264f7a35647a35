"""What a benchmark sends: traces, prompts, arrival times."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from crossdock.bench import traces
from crossdock.proto.errors import ConfigError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mooncake(at_ms: int, tokens: int, output: int, names: list[int]) -> dict[str, object]:
    return {
        "timestamp": at_ms,
        "input_length": tokens,
        "output_length": output,
        "hash_ids": names,
    }


def test_a_trace_is_read_and_equal_names_are_equal_prefixes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        mooncake(3000, 40, 5, [0, 1, 2]),
        mooncake(6000, 35, 6, [0, 1, 3]),
    )
    trace = traces.load_trace(path)
    assert trace.block_size == 16
    assert [row.at_s for row in trace.requests] == [0.0, 3.0]
    assert trace.hit_rate == pytest.approx(32 / 75)
    maker = traces.PromptMaker(trace.block_size)
    first, second = (maker.token_ids(row) for row in trace.requests)
    assert (len(first), len(second)) == (40, 35)
    assert first[:32] == second[:32]
    assert first[32:35] != second[32:35]
    assert all(1000 <= token < 30000 for token in first + second)
    assert traces.PromptMaker(16).token_ids(trace.requests[0]) == first
    assert traces.PromptMaker(16, seed=1).token_ids(trace.requests[0]) != first


def test_published_traces_have_blocks_of_512(tmp_path: Path) -> None:
    names = list(range(14))
    trace = traces.load_trace(write(tmp_path / "t.jsonl", mooncake(0, 6758, 500, names)))
    assert trace.block_size == 512


def test_replay_options(tmp_path: Path) -> None:
    given = [mooncake(1000 * i, 100 + i, 9, list(range(7))) for i in range(5)]
    path = write(tmp_path / "t.jsonl", *given)
    options = traces.TraceOptions(limit=3, time_scale=0.5, max_input=20, max_output=4)
    trace = traces.load_trace(path, options)
    assert [row.at_s for row in trace.requests] == [0.0, 0.5, 1.0]
    assert {(row.input_tokens, row.output_tokens) for row in trace.requests} == {(20, 4)}
    assert {len(row.block_ids) for row in trace.requests} == {2}
    jittered = traces.load_trace(path, traces.TraceOptions(jitter_s=0.5))
    late = [row.at_s - row.input_tokens + 100 for row in jittered.requests]
    assert all(0.0 <= each <= 0.5 for each in late)
    assert len(set(late)) == 5


def test_tenants_priorities_and_deadlines(tmp_path: Path) -> None:
    said = {"tenant": "a", "priority": -1, "deadline_ms": 1500}
    rows = [mooncake(0, 20, 5, [0, 1]) | said, mooncake(1000, 20, 5, [0, 1])]
    trace = traces.load_trace(write(tmp_path / "t.jsonl", *rows), traces.TraceOptions(max_input=9))
    first, second = trace.requests
    assert (first.tenant, first.priority, first.deadline_s) == ("a", -1, 1.5)
    assert (second.tenant, second.priority, second.deadline_s) == ("", 0, None)
    assert first.input_tokens == 9
    traces.write_mooncake(trace, tmp_path / "again.jsonl")
    assert traces.load_trace(tmp_path / "again.jsonl").requests == trace.requests


@pytest.mark.parametrize(("name", "mark"), [("t.csv", ""), ("t.CSV", "\ufeff")])
def test_azure_csv(tmp_path: Path, name: str, mark: str) -> None:
    path = tmp_path / name
    path.write_text(
        f"{mark}TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,40,10\n"
        "2023-11-16 18:17:04.4799600,16,8\n"
    )
    trace = traces.load_trace(path)
    assert [row.at_s for row in trace.requests] == pytest.approx([0.0, 0.5])
    assert [len(row.block_ids) for row in trace.requests] == [3, 1]
    assert trace.hit_rate == 0.0


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("t.jsonl", '{"timestamp": 0}\n', "t.jsonl:1"),
        ("t.jsonl", "\nnot json\n", "t.jsonl:2"),
        ("t.jsonl", "[1, 2]\n", "t.jsonl:1"),
        ("t.jsonl", "\udcff\n", "t.jsonl:1"),
        ("t.jsonl", json.dumps(mooncake(0, 0, 1, [1])), "t.jsonl:1"),
        ("t.jsonl", json.dumps(mooncake(0, 9, 1, [1]) | {"timestamp": math.nan}), "t.jsonl:1"),
        ("t.jsonl", json.dumps(mooncake(0, 9, 1, [1]) | {"timestamp": math.inf}), "t.jsonl:1"),
        ("t.jsonl", json.dumps(mooncake(0, 9, 1, [1]) | {"output_length": math.inf}), "t.jsonl:1"),
        ("t.jsonl", json.dumps(mooncake(0, 9, 1, [])), "hash_ids"),
        ("t.jsonl", json.dumps(mooncake(0, 9, 1, [1]) | {"deadline_ms": 0}), "deadline_ms"),
        ("t.jsonl", "", "no requests"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,x,1\n", "t.csv:2"),
    ],
)
def test_a_broken_trace_names_the_line(tmp_path: Path, name: str, text: str, where: str) -> None:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=where):
        traces.load_trace(tmp_path / name)


def test_block_sizes_that_fit_no_row_are_refused() -> None:
    rows = [traces.TraceRequest(0, 32, 1, (1, 2)), traces.TraceRequest(0, 100, 1, (1, 2))]
    with pytest.raises(ConfigError, match="no block size"):
        traces.infer_block_size(rows)


def test_a_synthetic_trace_has_the_shape_it_was_asked_for(tmp_path: Path) -> None:
    options = traces.SyntheticOptions(requests=2000, rate=4.0, mean_input=200, mean_output=20)
    trace = traces.synthesize(options)
    assert all(math.ceil(r.input_tokens / 16) == len(r.block_ids) for r in trace.requests)
    assert all(r.block_ids[0] == 0 for r in trace.requests)
    assert all(r.at_s % 3.0 == 0 for r in trace.requests)
    assert trace.requests[-1].at_s == pytest.approx(500, rel=0.1)
    mean = sum(r.output_tokens for r in trace.requests) / 2000
    assert mean == pytest.approx(20, rel=0.1)
    assert 0.1 < trace.hit_rate < 0.8
    unshared = traces.SyntheticOptions(requests=2000, mean_input=200, continued=0.0)
    assert traces.synthesize(unshared).hit_rate < trace.hit_rate / 2
    traces.write_mooncake(trace, tmp_path / "s.jsonl")
    again = traces.load_trace(tmp_path / "s.jsonl")
    assert again.block_size == 16
    assert [r.block_ids for r in again.requests] == [r.block_ids for r in trace.requests]


def test_random_prompts_share_the_prefix_and_nothing_else() -> None:
    trace = traces.random_workload(
        50, input_tokens=(20, 40), output_tokens=(3, 5), prefix_tokens=10, seed=0
    )
    maker = traces.PromptMaker(trace.block_size)
    prompts = [maker.token_ids(row) for row in trace.requests]
    assert {tuple(prompt[:10]) for prompt in prompts} == {tuple(prompts[0][:10])}
    assert len({tuple(prompt[10:18]) for prompt in prompts}) == 50
    assert {len(prompt) for prompt in prompts} <= set(range(20, 41))
    assert {row.output_tokens for row in trace.requests} == {3, 4, 5}


def test_arrival_times() -> None:
    assert traces.arrival_times(3, 2.0, poisson=False, seed=0) == [0.0, 0.5, 1.0]
    times = traces.arrival_times(4000, 10.0, poisson=True, seed=0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(400, rel=0.1)


def test_text_prompts_keep_shared_prefixes() -> None:
    maker = traces.PromptMaker(16)
    one, two = (maker.text(traces.TraceRequest(0, 32, 1, (7, name))) for name in (8, 9))
    assert one != two
    assert one.split()[:16] == two.split()[:16]
