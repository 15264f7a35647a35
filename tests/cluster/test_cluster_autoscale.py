"""Autoscaled pools of a real cluster of simulated engines: a step in load up, and down again."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest
from engines_kit import expected
from ray_kit import serving

from crossdock.client import AsyncClient
from crossdock.deploy import admin
from crossdock.proto.v1 import admin_pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

YAML = """
metadata: {{name: scaled-{pid}}}
model: {{id: simulated}}
gateway: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}}
controller: {{grpc: "127.0.0.1:{port}"}}
pools:
  prefill: {{role: prefill, replicas: 1, autoscale: {{min: 1, max: 4}}, {worker}}}
  decode: {{role: decode, replicas: 3, autoscale: {{min: 1, max: 4}}, {worker}}}
kv: {{transport: local}}
slo: {{ttft_ms: 1500, tpot_ms: 200}}
autoscale: {{interval_s: 1.5, down_s: 6, gpus: 4}}
"""
# A prompt of 500 tokens takes 0.35 s: three a second are one busy worker.
WORKER = (
    "resources: {cpus: 0.05}, drain_s: 10, chunk_tokens: 512, engine: {kind: simulated, profile: "
    "{prefill_s: 0.1, prefill_token_s: 0.0005, decode_s: 0.01, decode_sequence_s: 0.0005}}"
)
PROMPT = list(range(40, 90)) * 10


def sizes(cluster: admin_pb2.ClusterStatus) -> dict[str, int]:
    ready = [worker.pool for worker in cluster.workers if worker.state == "ready"]
    return {pool: ready.count(pool) for pool in ("prefill", "decode")}


class Load:
    """Requests at a rate until it is stopped; none may fail, and each gets the tokens it should."""

    def __init__(self, client: AsyncClient) -> None:
        self.client, self.served = client, 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    async def _one(self, number: int) -> None:
        prompt = [40 + number % 50, *PROMPT, number % 7 + 40]  # nothing of it is cached
        result = await self.client.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True)
        assert len(result.token_ids) == 8
        if number % 20 == 0:  # to work it out takes as long as a request
            assert list(result.token_ids) == await asyncio.to_thread(expected, prompt, 8)
        self.served += 1

    async def run(self, rate: float, until: asyncio.Event) -> None:
        while not until.is_set():
            self._count += 1
            self._tasks.add(asyncio.create_task(self._one(self._count)))
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*self._tasks)


async def follows(address: str, load: Load, rate: float, reached, timeout_s: float):
    """The status once the pools are of sizes that `reached` takes, under load at a rate."""
    stop = asyncio.Event()
    running = asyncio.create_task(load.run(rate, stop))
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            status = await asyncio.to_thread(admin.status, address)
            if reached(sizes(status)):
                return status
            assert time.monotonic() < deadline, (sizes(status), status.autoscaled)
            assert not running.done(), "a request failed"
            await asyncio.sleep(0.5)
    finally:
        stop.set()
        await running


def test_pools_follow_a_step_in_load_up_and_down(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    text = YAML.format(pid=os.getpid(), port=port, worker=WORKER)
    (tmp_path / "c.yaml").write_text(text)

    async def steps(cluster, pids: set[int]) -> None:
        client = AsyncClient(cluster.grpc)
        load = Load(client)
        status = await follows(cluster.admin, load, 6.0, lambda n: n["prefill"] >= 3, 120)
        done = [decision.action for decision in status.decisions]
        assert any(each.startswith("autoscale prefill 1 -> ") for each in done)
        assert any(each.startswith("flip decode-") for each in done), done
        assert len({worker.pid for worker in status.workers} & pids) >= 3, "most were there"
        await follows(cluster.admin, load, 0.5, lambda n: n["prefill"] == 1, 150)
        assert load.served > 50
        await client.close()

    with serving(tmp_path / "c.yaml") as cluster:
        pids = {worker.pid for worker in admin.status(cluster.admin).workers}
        asyncio.run(steps(cluster, pids))
        status = admin.status(cluster.admin, check_integrity=True)
        assert all(not worker.worker.integrity_error for worker in status.workers)
