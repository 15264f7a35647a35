"""The judgements inside the benchmark scripts, on numbers worked out by hand."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import types
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.bench.metrics import RequestRecord, Run
from crossdock.deploy.spec import ClusterSpec

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def model_of(logits: torch.Tensor) -> object:
    """Answers with the last rows of these logits, as transformers' models do."""

    def forward(ids: torch.Tensor, logits_to_keep: int) -> types.SimpleNamespace:
        assert ids.tolist() == [[7, 8, 0, 1]]
        return types.SimpleNamespace(logits=logits[None, -logits_to_keep:])

    return forward


def test_equivalence_tells_equal_tied_and_wrong_tokens_apart() -> None:
    from equivalence import compare

    logits = torch.tensor([[5.0, 1.0, 0.0], [2.0, 1.9995, 0.0], [0.0, 3.0, 1.0]])
    seen = compare(model_of(logits), [7, 8], (0, 1, 2))
    assert (seen.tokens, seen.ties, seen.mismatches) == (3, 1, 1)
    assert seen.largest_gap == 2.0


def test_equivalence_prompts_are_of_every_length() -> None:
    from equivalence import prompts

    made = prompts(40, 2000, english=list(range(100, 900)))
    lengths = [len(prompt) for prompt in made]
    assert len(made) == 40
    assert (min(lengths), max(lengths)) == (1, 2000)
    assert sum(length > 500 for length in lengths) >= 5
    assert made == prompts(40, 2000, english=list(range(100, 900)))


def test_throughput_lays_rounds_end_to_end() -> None:
    from throughput import pooled

    def round_of(tokens: int, seconds: float) -> Run:
        record = RequestRecord(0, 0.0, 0.0, (0.5, seconds), seconds, 10, tokens)
        return Run((record,))

    whole = pooled([round_of(20, 2.0), round_of(10, 4.0)])
    assert whole["duration_s"] == 6.0
    assert whole["output_throughput"] == 5.0
    assert whole["ttft_s"]["p50"] == 0.5


def test_a_storm_comes_in_bursts() -> None:
    from compare_colocated import storm_jobs

    options = Namespace(bursts=2, burst=3, storm_tokens=50, calm_s=10.0, burst_every_s=5.0)
    jobs = storm_jobs(options, seed=1)
    assert [job.due_s for job in jobs] == [10.0] * 3 + [15.0] * 3
    assert len({job.token_ids for job in jobs}) == 6
    assert {len(job.token_ids) for job in jobs} == {50}


def test_the_clusters_compared_have_equal_cores() -> None:
    from clusters import DISAGGREGATED, colocated, spec

    made = [ClusterSpec.parse(spec("a", pools)) for pools in (colocated(64), DISAGGREGATED)]
    cores = [sum(pool.replicas * pool.resources.cpus for pool in s.pools.values()) for s in made]
    assert cores == [2.0, 2.0]
    assert made[0].pools["both"].chunk_tokens == 64


def test_a_cluster_that_ends_before_ready_says_what_it_said() -> None:
    from clusters import _ready

    printed: queue.Queue[str | None] = queue.Queue()
    for line in ("starting\n", "error: port in use\n", None):
        printed.put(line)
    with pytest.raises(RuntimeError, match="port in use"):
        _ready(printed, until=float("inf"))
    printed.put("READY grpc=127.0.0.1:1 http=127.0.0.1:2\n")
    assert _ready(printed, until=sys.maxsize) == ("127.0.0.1:1", "127.0.0.1:2")
    with pytest.raises(TimeoutError):
        _ready(printed, until=0.0)


def vram_hand_off(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "vram_hand_off.py"), *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_without_a_gpu_the_vram_hand_off_says_so_and_is_no_failure() -> None:
    ended = vram_hand_off()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("vram_hand_off: nothing measured: no GPU that torch")
    assert ended.stdout.count("\n") == 1


def test_without_nixl_the_vram_hand_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import vram_hand_off

    monkeypatch.setattr(vram_hand_off.importlib.util, "find_spec", lambda name: None)
    assert vram_hand_off.missing("cpu") == "nixl is not installed"


@pytest.mark.slow
def test_the_vram_hand_off_runs_on_host_memory(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    sizes = ["--pool=24", "--blocks=8", "--rounds=2", "--layers=3", "--kv-heads=2"]
    ended = vram_hand_off("--device=cpu", f"--json={report_file}", *sizes)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("bytes equal\n")
    report = json.loads(report_file.read_text())
    assert report["block_bytes"] == 2 * 3 * 2 * 128 * 16 * 2
    assert report["descriptors_of_one_run"] == {"runs": 1, "blocks": 8, "layer_major": 48}
    for layout in ("one run", "scattered"):
        assert all(value > 0 for value in report[layout].values())


def test_the_three_ways_describe_the_same_number_of_bytes_inside_the_pools() -> None:
    from vram_hand_off import WAYS, Shape

    shape = Shape(pool=32, layers=4)
    remote, local = [3, 4, 5, 31, 0], [7, 8, 9, 0, 31]
    counts = {}
    for name, describe in WAYS.items():
        pieces = describe(remote, local, shape)
        counts[name] = len(pieces.nbytes)
        assert pieces.nbytes.sum() == 5 * shape.block_bytes
        for start in (pieces.remote, pieces.local):
            order = start.argsort()
            ends = (start + pieces.nbytes)[order]
            assert start.min() >= 0
            assert ends[-1] <= shape.pool * shape.block_bytes
            assert (start[order][1:] >= ends[:-1]).all()
    assert counts == {"runs": 3, "blocks": 5, "layer_major": 40}


# -- routing_trials.py -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{"load_of": 3}, {"load_of": 4, "silent": True, "watched_s": 10.0}], ids=str
)
def test_a_hung_prefill_worker_costs_little(how: dict[str, Any]) -> None:
    import routing_trials

    figures = routing_trials.hung(**how, start=8.0, seconds=20.0)
    assert figures["share of the hung one after 1 s, %"] <= 2.0
    assert figures["ratio"] <= 1.3


def test_streams_spread_over_the_decode_workers() -> None:
    import routing_trials

    figures = routing_trials.batch(streams=250, workers=25)
    assert figures["over max_batch"] == figures["idle workers"] == 0


def test_policies_are_compared_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import routing_trials

    small = {"batch": lambda policy: routing_trials.batch(policy, streams=50, workers=10)}
    monkeypatch.setattr(routing_trials, "TRIALS", small)
    routing_trials.main(["batch", "--policy", "predicted_latency", "--policy", "prefix_threshold"])
    printed = capsys.readouterr().out
    assert "predicted_latency" in printed and "prefix_threshold" in printed
    [idle] = [line for line in printed.splitlines() if "idle workers" in line]
    ours, theirs = (float(cell) for cell in idle.split("│")[-3:-1])
    assert ours == 0 < theirs, "a shared prefix gathers streams on the workers that have it"
    with pytest.raises(SystemExit):
        routing_trials.main(["batches"])


@pytest.mark.parametrize("short", [(5, 100), (50, 50)])
def test_false_deadline_refusals_are_corrected(short: tuple[int, int]) -> None:
    import routing_trials

    figures = routing_trials.deadlines(short=short, seconds=40.0)
    assert figures["taken with 5 s, %"] == 100
    assert figures["taken with 0.5 s, %"] <= 60, "what cannot be met is refused"


def test_the_audit_of_a_chaos_run_counts_sums_of_refused_requests() -> None:
    from audit_chaos import miscounted
    from chaos_report import Asked, End

    def asked(name: str, end: End, *token_ids: int) -> Asked:
        return Asked(name, 0, 0.0, list(token_ids), end=end)

    told = [asked(f"gone{i}", End.ABORTED) for i in range(3)]
    told += [asked("served", End.FINISHED, 7, 8), asked("refused", End.REFUSED)]
    lines: Any = defaultdict(list)
    lines["served"].append({"outcome": "ok", "choices": [{"token_ids": [7, 8]}]})
    arrived = types.SimpleNamespace(lives={"gone0", "gone1", "served", "refused"})
    outcome: Any = types.SimpleNamespace(asked=told, journal=arrived)
    sums = Counter({"cancelled": 2, "overloaded": 1})
    assert miscounted(outcome, lines, sums) == []
    assert miscounted(outcome, lines, sums + Counter({"cancelled": 1})) == []  # gone2 had arrived
    [missing] = miscounted(outcome, lines, sums - Counter({"cancelled": 1}))
    assert missing.startswith("gone1 (aborted): no line")
    [missing] = miscounted(outcome, lines, sums - Counter({"overloaded": 1}))
    assert missing.startswith("refused (refused): no line")
    [more] = miscounted(outcome, lines, sums + Counter({"overloaded": 2}))
    assert "2 more" in more
    lines["served"].clear()
    assert miscounted(outcome, lines, sums + Counter({"overloaded": 1}))  # it was started


def test_a_day_of_load_is_a_sinus_with_bursts() -> None:
    import autoscaling

    day = autoscaling.Day(low=1.0, high=3.0, period_s=100.0, seconds=100.0, burst_s=20.0)
    assert day.rate(0.0, ()) == pytest.approx(1.0) and day.rate(50.0, ()) == pytest.approx(3.0)
    assert day.rate(50.0, [40.0]) == pytest.approx(3.0 * (1 + 0.6 * 10 / 30))
    trace = day.trace(1)
    assert trace == day.trace(1) != day.trace(2)
    assert trace.hit_rate == 0 and len(trace.requests) == pytest.approx(220, rel=0.25)


def test_the_oracle_starts_workers_before_they_are_needed() -> None:
    import autoscaling

    from crossdock.bench.traces import Trace, TraceRequest
    from crossdock.engine.profiles import Profile

    spec = ClusterSpec.parse(
        autoscaling.SPEC.format(prefill=1, decode=1, common="", interval_s=5, attainment=0.98)
    )
    rows = [TraceRequest(100 + 0.5 * i, 1000, 10, (i,)) for i in range(120)]
    profile = Profile(prefill_token_s=1e-3, decode_s=0.01, decode_sequence_s=1e-3, start_s=20.0)
    trace = Trace(tuple(rows), 128)
    known = autoscaling.known_sizes(trace, spec, profile, 20.0, (0.8, 0.8))
    decide = autoscaling.oracle(known, spec, profile, 20.0)
    sizes = [decide(None, now)["prefill"] for now in (0.0, 70.0, 76.0, 120.0, 170.0)]
    assert sizes == [1, 1, 3, 3, 1]


def test_the_rule_of_one_more_or_less_moves_by_one() -> None:
    import autoscaling

    from crossdock.deploy.autoscaling.observation import Observation, PoolState, StepTimes
    from crossdock.router.dispatch.traffic import Traffic

    spec = ClusterSpec.parse(
        autoscaling.SPEC.format(prefill=4, decode=4, common="", interval_s=5, attainment=0.98)
    )
    steps = StepTimes(0.0, 1e-3, 0.0, 0.01, 1e-3, 0.0)
    pools = {name: PoolState(4, 4, running=20, steps=steps) for name in ("prefill", "decode")}
    busy = Traffic(started=100, ttft_met=90, finished=100, tpot_met=100, prompt_tokens=10_000)
    decide = autoscaling.plus_minus_one(spec)
    assert decide(Observation(5.0, pools, {"": busy}), 0.0) == {"prefill": 5, "decode": 3}


def test_predicts_compares_what_both_answered() -> None:
    from predicts import Placed, placed, rows

    from crossdock.results import Timings
    from crossdock.sim.cluster import Served

    def record(index: int, ttft: float, error: str = "") -> RequestRecord:
        return RequestRecord(index, 0.0, 5.0, (5 + ttft, 6 + ttft), 9.0, 20, 2, 16, error)

    records = [record(0, 1.0), record(1, 3.0), record(2, 50.0, "Timeout")]
    served = [Served(5.0, 20, 2, ttft, 6.5 + ttft, cached_tokens=8) for ttft in (2.0, 2.0, 2.0)]
    found = {row.name: row for row in rows(records, served)}
    assert found["TTFT p50"].ratio == 1.0
    assert found["TTFT p90"].measured == pytest.approx(2.8)
    assert found["TPOT mean"].ratio == pytest.approx(1.5)
    assert (found["hit tokens"].measured, found["hit tokens"].simulated) == (32, 16)

    events = {"routed": 1.0, "prefill_started": 1.5, "first_token": 3.0}
    known = Timings(events, predicted_ttft=2.5, prefill_worker="p0")
    timings = [known, Timings(events), Timings({}, predicted_ttft=1)]
    (only,) = placed(timings)
    assert only == Placed(1.0, 2.5, 1.5, 3.0, "p0") and only.error == 0.25
    sure = Placed(1.0, 4.0, 1.5, 3.0, "p0")  # 0.7 of that are 2.8 s
    assert [sure.refused_wrongly(d) for d in (2.9, 3.0, 3.7, 3.8)] == [False, True, True, False]


def test_predicts_tells_how_much_slower_prompts_were() -> None:
    from predicts import pace

    from crossdock.engine.profiles import Profile
    from crossdock.results import Timings

    records = [RequestRecord(i, 0, 0, (9.0,), 9.0, 120, 1, 20) for i in range(3)]
    timings = {i: Timings({"prefill_started": 1.0, "first_token": 3.0 + i}) for i in (0, 1)}
    assert pace(records, timings, Profile(prefill_token_s=0.01), 256) == pytest.approx(2.5)


def test_predicts_slows_a_trace_down_to_a_load() -> None:
    from predicts import time_scale

    from crossdock.bench.traces import Trace, TraceRequest
    from crossdock.engine.profiles import Profile

    profile = Profile(prefill_s=0.5, prefill_token_s=0.01)
    names = tuple(range(10))
    asked = (TraceRequest(0.0, 160, 1, names), TraceRequest(4.0, 160, 1, (*names[:5], 99)))
    trace = Trace(asked, 16)
    work_s = 2 * 0.5 + 160 * 0.01 + 0.5 + 80 * 0.01  # two chunks, then one behind a prefix
    assert time_scale(trace, profile, 100, 2, 0.5) == pytest.approx(work_s / (0.5 * 2 * 4.0))
    slowed = replace(profile, contention=(0.1, 0.5))
    assert time_scale(trace, slowed, 100, 2, 0.5) == pytest.approx(1.5 * work_s / (0.5 * 2 * 4.0))


def test_a_share_of_cores_that_cannot_be_had_is_said_and_leaves_nothing() -> None:
    import shares

    nobody = 2**22 + 1  # beyond the largest process id
    with shares.own_share([nobody], 0.5) as why:
        assert why
    groups = [*shares.V1.glob("crossdock-*"), *shares.V2.glob("crossdock-*")]
    assert not [group for group in groups if str(nobody) in group.name]


def test_fairness_counts_those_that_would_have_been_refused_wrongly() -> None:
    from fairness import Refused

    told = Refused(
        load=2.0, requests=1000, refused=360, refused_after_s=0.1, tried=40, wrongly=2, missed=9,
        cut=3,
    )  # fmt: skip
    assert told.wrong == pytest.approx(0.02), "a twentieth of the 400 that it would refuse"


def test_fairness_gives_each_tenant_prompts_of_its_own() -> None:
    from fairness import CLUSTER, Bench

    from crossdock.bench.traces import SyntheticOptions, synthesize

    rows = synthesize(SyntheticOptions(requests=50))
    bench = Bench(ClusterSpec.load(CLUSTER), rows, seconds=100.0, seed=1)
    one, two = (list(bench.asked(name, 2.0, salt)) for salt, name in enumerate("ab"))
    assert len(one) == pytest.approx(200, rel=0.25)
    names = [{name for row in rows for name in row.block_ids} for rows in (one, two)]
    assert not names[0] & names[1]
    assert {row.tenant for row in two} == {"b"}
    assert [row.input_tokens for row in one[:50]] == [row.input_tokens for row in rows.requests]
