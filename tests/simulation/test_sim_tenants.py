"""Tenants, priorities and deadlines in the simulator, through the product's own dispatcher."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from crossdock.bench.metrics import percentile
from crossdock.bench.traces import Trace, TraceRequest
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.links import WorkerLink
from crossdock.sim.cluster import WARM_UP_S, Served, SimCluster

PROFILE = Profile(
    kv_bytes_per_token=1000,
    prefill_s=0.01,
    prefill_token_s=1e-4,
    decode_s=0.01,
    link_bytes_per_s=1e9,
)
SPEC = ClusterSpec.parse("""
metadata: {name: sim}
model: {id: simulated}
pools:
  prefill: {role: prefill, replicas: 1, engine: {kind: simulated}, chunk_tokens: 512}
  decode: {role: decode, replicas: 1, engine: {kind: simulated}}
kv: {transport: local, block_size: 16}
slo: {ttft_ms: 1000, tpot_ms: 40}
""")
PROMPT_TOKENS, PROMPT_S = 480, 0.058  # of one such prompt: 17 a second


def asked(rate: float, seconds: float, first_name: int = 0, **about: object) -> list[TraceRequest]:
    """Poisson arrivals of prompts that share nothing."""
    rng, rows, at = random.Random(first_name), [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        name = first_name + 30 * len(rows)
        rows.append(TraceRequest(at, PROMPT_TOKENS, 4, tuple(range(name, name + 30)), **about))
    return rows


def run(*rows: list[TraceRequest]) -> list[tuple[TraceRequest, Served]]:
    """What came of each."""
    trace = tuple(sorted((row for some in rows for row in some), key=lambda row: row.at_s))
    served = SimCluster(SPEC, PROFILE).run(Trace(trace, 16))
    return list(zip(trace, served, strict=True))


def p99(found: list[tuple[TraceRequest, Served]], names: range) -> float:
    """Of the TTFT of requests whose first block has one of these names; a refused one has waited
    for long."""
    seen = [each.ttft_s for row, each in found if row.block_ids[0] in names]
    return percentile([100.0 if ttft_s is None else ttft_s for ttft_s in seen], 99)


def test_a_flood_moves_another_tenants_p99_by_a_fifth_at_most() -> None:
    mine, other = range(10**6), 10**6
    steady = asked(3.0, 60.0, tenant="steady")
    beside = run(steady, asked(3.0, 60.0, other, tenant="other"))
    flooded = run(steady, asked(30.0, 60.0, other, tenant="other"))
    as_one = run(steady, asked(30.0, 60.0, other, tenant="steady"))
    assert p99(flooded, mine) <= 1.2 * p99(beside, mine)
    assert p99(as_one, mine) > 5 * p99(beside, mine), "tenants are what does it"


def test_a_more_urgent_priority_goes_first_within_a_tenant() -> None:
    later = asked(30.0, 10.0, tenant="t", priority=1)
    urgent = asked(2.0, 10.0, 10**6, tenant="t")
    found = run(later, urgent)
    assert p99(found, range(10**6, 2 * 10**6)) < 5 * PROMPT_S < p99(found, range(10**6))


def test_deadlines_that_cannot_be_met_are_refused_at_once() -> None:
    """At twice of what can be computed half is refused, most of them in time to go elsewhere, and
    most of those that are taken on have their first token in time."""
    found = run(asked(34.0, 20.0, deadline_s=1.0))
    refused = [each for _, each in found if each.error == "Overloaded"]
    taken = [each for _, each in found if each.error != "Overloaded"]
    assert 0.3 < len(refused) / len(found) < 0.6
    assert percentile([each.ended_s - each.at_s for each in refused], 50) < 0.4
    met = [each for each in taken if each.ttft_s is not None and each.ttft_s <= 1.0]
    assert len(met) >= 0.8 * len(taken)


def test_an_earlier_deadline_does_not_wait_for_later_ones() -> None:
    """What waits with 20 s of time keeps nobody from being taken who has half a second."""
    patient = [replace(row, at_s=0.0) for row in asked(10.0, 8.0, deadline_s=20.0)]
    hasty = [replace(row, at_s=1.0) for row in asked(10.0, 0.3, 10**6, deadline_s=0.5)]
    found = run(patient, hasty)
    assert hasty
    assert {each.error for _, each in found} == {""}


def test_lost_block_events_heal_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = SimCluster(SPEC, PROFILE)
    (gateway,) = cluster.gateways
    lost: list[pb.WorkerFrame] = []
    seen: list[bool] = []

    def lose(frame: pb.WorkerFrame) -> None:
        if cluster.clock.now > WARM_UP_S and not lost and frame.block_events.events:
            lost.append(frame)
            frame.ClearField("block_events")

    def know() -> bool:
        """Whether the gateway knows what the prefill worker has cached."""
        (worker,) = (each for each in gateway.view.workers.values() if each.role == "prefill")
        (real,) = (each for each in cluster.workers if each.config.role == "prefill")
        held = {each.block_hash for each in real.loop.snapshot().block_events.events}
        return set(gateway.view.index.held(worker.slot)) == held != set()

    before = WorkerLink.receive
    monkeypatch.setattr(
        WorkerLink, "receive", lambda link, frame: (lose(frame), before(link, frame))[1]
    )
    cluster.clock.call_at(WARM_UP_S + 0.2, lambda: seen.append(know()))
    cluster.clock.call_at(WARM_UP_S + 1.2, lambda: seen.append(know()))
    names = tuple(range(30))
    cluster.run(Trace((TraceRequest(0.0, 480, 2, names), TraceRequest(3.0, 16, 2, (99,))), 16))
    assert lost and seen == [False, True]
