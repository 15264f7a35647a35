"""What profiles say of steps, links and memory; the derived ones are what is documented."""

from __future__ import annotations

from dataclasses import replace

import pytest
from source_rules import ROOT

from crossdock.deploy.spec import ClusterSpec
from crossdock.engine import registry
from crossdock.engine.profiles import (
    H100,
    H200,
    LLAMA_8B,
    LLAMA_70B,
    Profile,
    derived,
    kv_memory_mb,
)
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.proto.settings import check_settings
from crossdock.proto.types import SamplingParams


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence("s", token_ids, len(token_ids), SamplingParams())


def test_a_step_takes_what_the_profile_says() -> None:
    profile = Profile(
        prefill_s=1.0,
        prefill_token_s=0.1,
        prefill_attention_s=0.01,
        decode_s=0.5,
        decode_sequence_s=0.02,
        decode_context_s=0.001,
    )
    one, two = sequence([5] * 40), sequence([5] * 30)
    plan = StepPlan((Chunk(one, 10, 20, False), Chunk(two, 29, 1, True)))
    prompt_s, decodes_s = 1.0 + 0.1 * 20 + 0.01 * 20 * 20, 0.02 + 0.001 * 30
    assert profile.step_s(plan) == pytest.approx(prompt_s + decodes_s), "weights are read once"
    assert profile.step_s(StepPlan(plan.chunks[:1])) == pytest.approx(prompt_s)
    assert profile.step_s(StepPlan(plan.chunks[1:])) == pytest.approx(0.5 + decodes_s)
    short = StepPlan((Chunk(one, 0, 2, False), plan.chunks[1]))
    slow = replace(profile, decode_s=5.0)
    assert slow.step_s(short) == pytest.approx(5.0 + 0.01 * 2 * 1 + decodes_s)


def test_a_pull_takes_what_the_link_says() -> None:
    profile = Profile(kv_bytes_per_token=1000, link_latency_s=0.5, link_bytes_per_s=4000)
    assert profile.pull_s(6) == 0.5 + 1.5
    assert replace(profile, link_bytes_per_s=0.0).pull_s(6) == 0.5


def test_derived_profiles_are_what_their_models_and_machines_say() -> None:
    """Parameters and KV as published; the rest is in docs/performance.md, figure by figure."""
    assert round(LLAMA_8B.weights / 1e9, 2) == 8.03
    assert round(LLAMA_70B.weights / 1e9, 2) == 70.55
    assert (LLAMA_8B.kv_bytes, LLAMA_70B.kv_bytes) == (131_072, 327_680)
    page = (ROOT / "docs" / "performance.md").read_text()
    for name in ("h200-llama-3.1-8b", "h100x4-llama-3.1-70b"):
        profile = Profile.NAMED[name]
        check_settings(profile)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        told = [float(cell.replace(",", "")) for cell in row.split("|")[2:-1]]
        assert told == [
            profile.prefill_s * 1e3,
            pytest.approx(profile.prefill_token_s * 1e6, rel=2e-3),
            pytest.approx(profile.prefill_attention_s * 1e9, rel=2e-3),
            pytest.approx(profile.decode_s * 1e3, rel=2e-3),
            pytest.approx(profile.decode_sequence_s * 1e6, rel=2e-3),
            pytest.approx(profile.decode_context_s * 1e9, rel=2e-3),
            profile.link_bytes_per_s / 1e9,
            profile.start_s,
        ]


def test_more_gpus_share_the_work_and_pay_for_it() -> None:
    one, four = derived(LLAMA_70B, H100), derived(LLAMA_70B, H100, gpus=4)
    for term in ("prefill_token_s", "decode_s"):
        assert 1 < 4 * getattr(four, term) / getattr(one, term) < 1.6, "all-reduce is not free"
    for term in ("prefill_attention_s", "decode_context_s"):
        assert getattr(four, term) == pytest.approx(getattr(one, term) / 4, rel=1e-3)
    assert (four.gpus, four.link_bytes_per_s) == (4, 4 * one.link_bytes_per_s)


def test_the_shipped_cluster_has_the_memory_that_its_profile_leaves() -> None:
    spec = ClusterSpec.load(ROOT / "deploy" / "manifests" / "sim-8p8d.yaml")
    assert {name: pool.replicas for name, pool in spec.pools.items()} == {"prefill": 8, "decode": 8}
    for pool in spec.pools.values():
        assert pool.engine == registry.settings_of("simulated")(
            kind="simulated", profile=Profile.NAMED["h200-llama-3.1-8b"]
        )
        assert 0.99 < pool.kv_memory_mb / kv_memory_mb(LLAMA_8B, H200) <= 1
    assert (spec.slo.ttft_ms, spec.slo.tpot_ms) == (2000, 30)


def test_the_profile_of_the_default_model_gives_its_measured_rates() -> None:
    """docs/performance.md: 989, 832 and 669 tok/s of prefill; 53, 241 and 323 of decode."""
    profile, one = Profile.NAMED["cpu-135m"], sequence([5] * 2048)
    for tokens, rate in ((280, 989), (1024, 832), (2048, 669)):
        starts = range(0, tokens, 256)
        chunks = [Chunk(one, start, min(256, tokens - start), False) for start in starts]
        seconds = sum(profile.step_s(StepPlan((chunk,))) for chunk in chunks)
        assert tokens / seconds == pytest.approx(rate, rel=0.02)
    for batch, rate in ((1, 53), (8, 241), (16, 323)):
        plan = StepPlan((Chunk(one, 299, 1, True),) * batch)
        assert batch / profile.step_s(plan) == pytest.approx(rate, rel=0.02)
