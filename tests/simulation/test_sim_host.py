"""Workers of one host, which slow each other down, on the virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crossdock.bench.traces import Trace, TraceRequest
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.sim.cluster import Served, SimCluster
from crossdock.sim.host import Host

SPEC = """
metadata: {name: host}
model: {id: simulated}
pools:
  prefill: {role: prefill, replicas: 1, engine: {kind: simulated}, chunk_tokens: 512}
  decode: {role: decode, replicas: 1, engine: {kind: simulated}}
kv: {transport: local, block_size: 16}
"""
ALONE = Profile(prefill_token_s=1e-3, decode_s=0.02)
SHARED = replace(ALONE, contention=(0.5,))
TOKENS = 100


def served(profile: Profile, *requests: TraceRequest) -> list[Served]:
    return SimCluster(ClusterSpec.parse(SPEC), profile).run(Trace(requests, 16))


def asked(at_s: float, prompt: int, answer: int, name: int) -> TraceRequest:
    return TraceRequest(at_s, prompt, answer, tuple(range(name, name + -(-prompt // 16))))


def test_each_is_told_how_many_others_compute() -> None:
    host, told = Host(), {"a": [], "b": []}
    for who in ("a", "a", "b"):
        host.enter(who, told[who].append)
    host.leave("a")
    host.leave("a")
    assert told == {"a": [0, 1], "b": [1, 0]}


def test_a_worker_alone_is_as_fast_as_its_profile_says() -> None:
    request = asked(0.0, 400, TOKENS, 0)
    (alone,), (shared,) = served(ALONE, request), served(SHARED, request)
    assert shared == alone


def test_prompts_and_decodes_of_one_host_slow_each_other_down() -> None:
    """One stream decodes, in steps that the simulator takes together, while a prompt of two chunks
    is computed: both take half as long again for as long as the other computes, and no longer."""
    requests = asked(0.0, 16, TOKENS, 0), asked(0.5, 800, 1, 1000)
    alone, shared = served(ALONE, *requests), served(SHARED, *requests)
    assert shared[1].ttft_s == pytest.approx(1.5 * alone[1].ttft_s, rel=0.02)
    longer_s = shared[0].last_s - alone[0].last_s
    assert longer_s == pytest.approx(shared[1].ttft_s / 3, rel=0.05), "a third of that time is lost"
    assert shared[0].longest_gap_s == pytest.approx(0.03, rel=0.02)
