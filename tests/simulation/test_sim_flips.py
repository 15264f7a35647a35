"""Workers of a simulated cluster change their roles, as reconcile() has it."""

from __future__ import annotations

from crossdock.bench.traces import Trace, TraceRequest
from crossdock.deploy.autoscaling.observation import Observation
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.sim.cluster import SimCluster

SPEC = """
metadata: {name: sim}
model: {id: simulated}
pools:
  prefill: {role: prefill, replicas: 4, autoscale: {min: 1, max: 7}, engine: {kind: simulated}}
  decode: {role: decode, replicas: 2, autoscale: {min: 1, max: 7}, engine: {kind: simulated}}
kv: {transport: local, block_size: 16}
slo: {ttft_ms: 1000, tpot_ms: 40}
autoscale: {interval_s: 5, gpus: 6}
"""
PROFILE = Profile(
    kv_bytes_per_token=1000,
    prefill_s=0.005,
    prefill_token_s=2e-4,
    decode_s=0.01,
    decode_sequence_s=1e-3,
    start_s=60.0,
)


def test_a_shift_from_prompts_to_answers_moves_workers_and_fails_nobody() -> None:
    rows, at = [], 0.0
    for until, tokens, answer, rate in ((120.0, 1200, 8, 8.0), (300.0, 64, 200, 10.0)):
        while at < until:
            names = tuple(range(100 * len(rows), 100 * len(rows) + -(-tokens // 16)))
            rows.append(TraceRequest(at, tokens, answer, names))
            at += 1 / rate

    def sizes(seen: Observation, now: float) -> dict[str, int]:
        return {"prefill": 2, "decode": 4} if now > 125 else {"prefill": 4, "decode": 2}

    cluster = SimCluster(ClusterSpec.parse(SPEC), PROFILE, decide=sizes)
    served = cluster.run(Trace(tuple(rows), 16))
    assert {each.error for each in served} == {""}
    assert [each.output_tokens for each in served] == [row.output_tokens for row in rows]
    members = [member for member in cluster.control.members if member.gone_at is None]
    pools = [member.pool for member in members]
    assert (pools.count("prefill"), pools.count("decode")) == (2, 4)
    assert all(member.start_s is None for member in members), "no process was started for it"
    for worker in cluster.workers:
        worker.role.state.pool.check_integrity(worker.role.held())
