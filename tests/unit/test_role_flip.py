"""Workers that change their roles under load: no request fails, and every token is as ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import cluster_kit
import pytest
from cluster_kit import Cluster
from engines_kit import expected

from crossdock.decode.role import DecodeRole
from crossdock.engine.simulated import Profile, Settings
from crossdock.prefill.role import PrefillRole
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.worker.server import WorkerServer

OTHERS = {Role.PREFILL: (Role.DECODE, DecodeRole), Role.DECODE: (Role.PREFILL, PrefillRole)}
PROFILE = Profile(prefill_token_s=5e-5, decode_s=0.002)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    roles = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE]
    engine = Settings(kind="simulated", profile=PROFILE)
    made = await cluster_kit.start("simulated", roles, engine=engine)  # type: ignore[arg-type]
    yield made
    await cluster_kit.stop(made)


async def flip(cluster: Cluster, worker: WorkerServer, number: int, drain_s: float) -> None:
    """As the controller has it done: gateways hear that it leaves, it drains, and comes back."""
    gateway = cluster.gateway
    staying = [w.endpoint for w in cluster.workers if w is not worker]
    await gateway.update_members(staying)
    await worker.drain(drain_s, stays=True)
    role, role_type = OTHERS[worker.config.role]
    told = replace(worker.config, name=f"{role}-{number}", pool=str(role), role=role)
    await worker.become(told, role_type)
    endpoints: list[WorkerEndpoint] = [w.endpoint for w in cluster.workers]
    for each in cluster.workers:
        await each.update_peers(endpoints)
    await gateway.update_members(endpoints)
    async with asyncio.timeout(20):
        while not {e.name for e in endpoints} <= gateway.view.workers.keys():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("drain_s", [20.0, 0.0], ids=["finished here", "handed back"])
async def test_no_request_fails_while_workers_change_their_roles(
    cluster: Cluster, drain_s: float
) -> None:
    over = asyncio.Event()
    served = 0

    async def client(number: int) -> None:
        nonlocal served
        while not over.is_set():
            prompt = [40 + (number * 7 + i) % 60 for i in range(40 + 8 * number)]
            result = await cluster.client.generate(
                prompt, max_tokens=24, temperature=0, ignore_eos=True
            )
            assert list(result.token_ids) == expected(prompt, 24)
            served += 1

    clients = [asyncio.create_task(client(number)) for number in range(12)]
    order = [2, 0, 2, 0, 3, 1]  # prefill and decode workers by turns; two pairs stay two pairs
    for number, index in enumerate(order):
        before = served
        await flip(cluster, cluster.workers[index], 10 + number, drain_s)
        async with asyncio.timeout(20):
            while served < before + 12 and not any(task.done() for task in clients):
                await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*clients)
    assert served >= 12 * len(order)
    roles = sorted(str(w.config.role) for w in cluster.workers)
    assert roles == ["decode", "decode", "prefill", "prefill"]
    await cluster.settled()
