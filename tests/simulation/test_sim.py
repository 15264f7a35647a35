"""The simulator: the product's own parts on a virtual clock give the times that arithmetic says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crossdock.bench.traces import SyntheticOptions, Trace, TraceRequest, synthesize, write_mooncake
from crossdock.cli import app, main
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.proto.errors import ConfigError
from crossdock.sim import engine
from crossdock.sim.cluster import WARM_UP_S, SimCluster, load_profile
from crossdock.sim.report import SimReport, report
from crossdock.sim.worker import CALL_S

PROFILE = Profile(
    kv_bytes_per_token=1000,
    prefill_s=0.01,
    prefill_token_s=1e-4,
    prefill_attention_s=1e-8,
    decode_s=0.02,
    decode_sequence_s=1e-4,
    decode_context_s=1e-7,
    link_latency_s=0.001,
    link_bytes_per_s=1e8,
)
SPEC = """
apiVersion: crossdock/v1
kind: Cluster
metadata: {name: sim}
model: {id: simulated}
pools:
  prefill: {role: prefill, replicas: 2, engine: {kind: simulated}, chunk_tokens: 512}
  decode: {role: decode, replicas: 2, engine: {kind: simulated}}
kv: {transport: local, block_size: 16}
slo: {ttft_ms: 1000, tpot_ms: 40}
"""


def spec_of(**replicas: int) -> ClusterSpec:
    spec = ClusterSpec.parse(SPEC)
    for pool, count in replicas.items():
        spec = spec.with_replicas(pool, count)
    return spec


def trace_of(*rows: tuple[float, int, int, tuple[int, ...]]) -> Trace:
    return Trace(tuple(TraceRequest(*row) for row in rows), 16)


def simulated(trace: Trace, spec: ClusterSpec | None = None, **options: int) -> SimCluster:
    cluster = SimCluster(spec or spec_of(), PROFILE, **options)
    cluster.run(trace)
    return cluster


def shaped(requests: int = 120, rate: float = 12.0) -> Trace:
    return synthesize(
        SyntheticOptions(requests=requests, rate=rate, mean_output=20, mean_input=300, burst_s=0.5)
    )


def test_equal_prompts_share_steps_where_a_step_takes_as_long_whatever_is_in_it() -> None:
    """Prompts of one length, one a step, would never tell what of its time is fixed."""
    fixed = replace(PROFILE, prefill_s=0.02, prefill_token_s=0.0, prefill_attention_s=0.0)
    spec = spec_of(prefill=1, decode=1)
    rows = [(5.0 * (i // 40), 64, 2, tuple(range(4 * i, 4 * i + 4))) for i in range(400)]
    ttfts = [each.ttft_s or 0.0 for each in SimCluster(spec, fixed).run(trace_of(*rows))]
    assert max(ttfts[40:]) < 0.25, "eight of 64 tokens share a step of 512: 40 take five"


def test_quick_prompts_follow_each_other_without_a_pause() -> None:
    """Two chunks that take less than it takes until a report is sure to have counted them: the next
    goes when token 0 comes, not when the worker, idle by then, reports in a second."""
    quick = replace(PROFILE, prefill_token_s=1e-5, prefill_attention_s=0.0, link_bytes_per_s=0.0)
    rows = [
        (at, 1024, 50, tuple(range(64 * i, 64 * i + 64))) for i, at in enumerate([0.0] + [5.0] * 4)
    ]
    cluster = SimCluster(spec_of(prefill=1, decode=1), quick)
    _, *ttfts = [each.ttft_s for each in cluster.run(trace_of(*rows))]
    assert ttfts == pytest.approx([0.03, 0.06, 0.09, 0.12], rel=0.05), (
        "two steps of 512 tokens each"
    )


def test_one_request_takes_what_its_steps_and_its_transfer_take() -> None:
    cluster = simulated(trace_of((0.0, 1000, 11, tuple(range(63)))))
    (served,) = cluster.served
    computed = 2 * PROFILE.prefill_s + 1000 * PROFILE.prefill_token_s
    attended = PROFILE.prefill_attention_s * (512 * 256 + 488 * (512 + 244))
    assert served.ttft_s == pytest.approx(computed + attended + 2 * CALL_S, rel=1e-9)
    step = PROFILE.decode_s + PROFILE.decode_sequence_s + 1005.5 * PROFILE.decode_context_s
    # Behind token 0: the blocks of the last chunk, the fence, and what is said on the way.
    stall = 10 * step - (served.last_s - served.ttft_s)
    pulled = (63 - 32) * 16 * PROFILE.kv_bytes_per_token / PROFILE.link_bytes_per_s
    assert -stall == pytest.approx(pulled + 2 * PROFILE.link_latency_s + 2 * CALL_S, abs=1e-3)
    assert served.output_tokens == 11 and not served.error
    assert served.longest_gap_s == pytest.approx(step - stall, abs=2e-3)


def test_a_prefix_that_was_computed_is_found() -> None:
    names = tuple(range(64))
    rows = [(0.0, 1024, 2, names), (5.0, 1024, 2, (*names[:32], *range(100, 132)))]
    first, second = simulated(trace_of(*rows)).served
    assert (first.cached_tokens, second.cached_tokens) == (0, 512)
    assert second.prefill_worker == first.prefill_worker
    assert second.ttft_s < 0.6 * first.ttft_s


def test_every_request_gets_its_tokens_and_nothing_is_left_behind() -> None:
    trace = shaped()
    cluster = simulated(trace)
    wanted = [each.output_tokens for each in trace.requests]
    assert [each.output_tokens for each in cluster.served] == wanted
    assert {each.error for each in cluster.served} == {""}
    for worker in cluster.workers:
        worker.role.state.pool.check_integrity(worker.role.held())
    assert {worker.role.idle for worker in cluster.workers} == {True}


def test_equal_seeds_give_equal_reports() -> None:
    spec, trace = spec_of(), shaped()
    one, same, other = (report("p", simulated(trace, seed=s), spec.slo) for s in (1, 1, 2))
    assert one == same
    assert one != other
    assert one.prompt_tokens == other.prompt_tokens


def test_steps_taken_together_change_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, trace = spec_of(), shaped(900)
    together = report("p", simulated(trace), spec.slo)
    monkeypatch.setattr(engine, "MOST_STEPS", 1)
    apart = report("p", simulated(trace), spec.slo)
    for name in ("ttft_p50", "ttft_p90", "tpot_mean", "tpot_p99"):
        assert getattr(together, name) == pytest.approx(getattr(apart, name), rel=0.1)
    assert together.output_tokens == apart.output_tokens


def test_two_transfers_over_one_interface_take_turns() -> None:
    rows = [(0.0, 1600, 2, tuple(range(100))), (0.0, 1600, 2, tuple(range(100, 200)))]
    slow = replace(PROFILE, link_bytes_per_s=1e6)

    def stalls(**replicas: int) -> list[float]:
        cluster = SimCluster(spec_of(**replicas), slow)
        return [s.longest_gap_s for s in cluster.run(trace_of(*rows))]

    alone_s = 1600 * slow.kv_bytes_per_token / slow.link_bytes_per_s
    assert max(stalls(decode=1)) > 1.5 * alone_s
    assert max(stalls(decode=2)) < 1.5 * alone_s


def test_a_pool_without_a_profile_is_refused() -> None:
    text = SPEC.replace("engine: {kind: simulated}, chunk_tokens", "chunk_tokens")
    text = text.replace(", engine: {kind: simulated}}", "}").replace(
        "simulated", "smollm2-135m-instruct"
    )
    with pytest.raises(ConfigError, match="--profile"):
        SimCluster(ClusterSpec.parse(text))


def test_profiles_by_name_and_by_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text("decode_s: 0.02\nprefill_token_s: 1.0e-4\n")
    assert load_profile(str(file)) == Profile(decode_s=0.02, prefill_token_s=1e-4)
    assert load_profile("cpu-135m") is Profile.NAMED["cpu-135m"]
    file.write_text("decode_s: 0.02\ndecode_z: 1\n")
    with pytest.raises(ConfigError, match=r"profile\.yaml:2.*decode_z"):
        load_profile(str(file))
    file.write_text("decode_s: -1\n")
    with pytest.raises(ConfigError, match="decode_s"):
        load_profile(str(file))
    with pytest.raises(ConfigError, match="h200-llama"):
        load_profile("h300")


def test_the_command_compares_policies_at_several_rates(tmp_path: Path) -> None:
    trace, cluster, out = (tmp_path / name for name in ("t.jsonl", "c.yaml", "out.json"))
    write_mooncake(shaped(40), trace)
    cluster.write_text(SPEC)
    line = [str(trace), "--cluster", str(cluster), "--profile", "cpu-135m", "--json", str(out)]
    line += ["--policy", "predicted_latency", "--policy", "round_robin"]
    ran = CliRunner().invoke(app, ["sim", *line, "--rate-scale", "0.2", "--rate-scale", "0.5"])
    assert ran.exit_code == 0, ran.output
    assert "round_robin" in ran.output
    reports = json.loads(out.read_text())
    assert [each["policy"] for each in reports] == ["predicted_latency", "round_robin"] * 2
    assert reports[2]["rate"] == pytest.approx(2.5 * reports[0]["rate"])
    assert set(reports[0]) == set(SimReport.__dataclass_fields__)
    wrong = CliRunner().invoke(app, ["sim", *line, "--policy", "best"])
    assert wrong.exit_code == 1 and "best" in str(wrong.exception)
    wrong = CliRunner().invoke(app, ["sim", *line, "--rate-scale", "nan"])
    assert wrong.exit_code == 1 and "--rate-scale" in str(wrong.exception)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("--rate-scale", "0", "--rate-scale: 0 must be above 0 and finite"),
        ("--rate-scale", "nan", "--rate-scale: nan must be above 0 and finite"),
        ("--rate-scale", "inf", "--rate-scale: inf must be above 0 and finite"),
        ("--json", "nowhere/out.json", "'--json': nowhere is no folder"),
        ("--html", ".", "'--html': . is a folder"),
    ],
)
def test_what_cannot_be_simulated_or_written_is_refused_before_anything_runs(
    option: str,
    value: str,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """A rate of NaN had no time at which a request could come: the clock ran for ever."""
    monkeypatch.setattr(SimCluster, "run", lambda *_: pytest.fail("it ran"))
    trace, cluster = tmp_path / "t.jsonl", tmp_path / "c.yaml"
    write_mooncake(shaped(4), trace)
    cluster.write_text(SPEC)
    line = [str(trace), "--cluster", str(cluster), "--profile", "cpu-135m", "--rate-scale", "1"]
    assert main(["sim", *line, option, value]) != 0
    assert error in capsys.readouterr().err


AUTOSCALED = SPEC.replace("chunk_tokens: 512}", "chunk_tokens: 512, autoscale: {min: 1, max: 6}}")
AUTOSCALED = AUTOSCALED.replace(
    "decode, replicas: 2, engine: {kind: simulated}}",
    "decode, replicas: 2, engine: {kind: simulated}, autoscale: {min: 1, max: 6}}",
)


def test_autoscaled_pools_follow_the_load_and_lose_nothing() -> None:
    """Few, then many, then few requests a second; workers take 5 s to start."""
    spec = ClusterSpec.parse(AUTOSCALED + "autoscale: {interval_s: 2}\n")
    rows, at = [], 0.0
    for rate, seconds in ((2, 30), (30, 60), (2, 120)):
        end = at + seconds
        while at < end:
            name = 50 * len(rows)
            rows.append((at, 800, 20, tuple(range(name, name + 50))))
            at += 1 / rate
    cluster = SimCluster(spec, replace(PROFILE, start_s=5.0))
    served = cluster.run(trace_of(*rows))
    assert {each.error for each in served} == {""}
    assert {each.output_tokens for each in served} == {20}
    changes = [(at, change.target) for at, change in cluster.control.changes]
    most_at, most = max(changes, key=lambda change: change[1])
    assert 30 < most_at < 92 and most >= 4
    assert len(cluster.workers) < most, "most of them have gone again"
    assert cluster.control.worker_seconds(cluster.clock.now) < 12 * cluster.clock.now
    late = [each for each in served[-100:] if each.ttft_s > 1]
    assert not late
    for worker in cluster.workers:
        worker.role.state.pool.check_integrity(worker.role.held())


def test_a_gateway_counts_what_another_has_sent() -> None:
    spec = ClusterSpec.parse(SPEC + "gateway: {replicas: 2}\n")
    cluster = SimCluster(spec, PROFILE)
    seen: dict[str, list[int]] = {}

    def look(when: str) -> None:
        other = cluster.gateways[1].view.workers.values()
        seen[when] = [each.tokens for worker in other for each in worker.computing.values()]

    cluster.clock.call_at(WARM_UP_S + 0.01, look, "sent")
    cluster.clock.call_at(WARM_UP_S + 0.5, look, "computed")
    rows = [(0.0, 1000, 50, tuple(range(63))), (2.0, 16, 2, (99,))]
    first, _ = cluster.run(trace_of(*rows))
    assert first.ttft_s < 0.5 < first.last_s
    assert seen == {"sent": [1000], "computed": []}


def test_two_gateways_find_as_much_as_one() -> None:
    trace = shaped(400, rate=16.0)

    def hits(gateways: int) -> int:
        spec = ClusterSpec.parse(SPEC + f"gateway: {{replicas: {gateways}}}\n")
        return report("p", simulated(trace, spec), spec.slo).hit_tokens

    assert hits(2) == pytest.approx(hits(1), rel=0.1)
