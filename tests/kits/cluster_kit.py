"""A gateway, workers and a client in this process, joined by real gRPC."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from crossdock.client import AsyncClient
from crossdock.decode import role as decode_worker
from crossdock.prefill import role as prefill_worker
from crossdock.proto.hashing import hash_key
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.router.gateway import GatewayConfig, GatewayServer
from crossdock.worker.config import WorkerConfig
from crossdock.worker.server import WorkerServer

KEY = b"a key of this test cluster"


@dataclass
class Cluster:
    gateway: GatewayServer
    workers: list[WorkerServer]
    client: AsyncClient

    async def settled(self) -> list[worker_pb2.WorkerStatus]:
        """Once nothing is held anywhere; fails if that takes long or a block is unaccounted."""
        statuses = []
        for worker in self.workers:
            async with asyncio.timeout(10):
                while True:
                    status = await worker.status(check_integrity=True)
                    assert status.integrity_error == ""
                    if not (status.used_blocks or status.leases or status.load.running):
                        break
                    await asyncio.sleep(0.02)
            statuses.append(status)
        return statuses


async def start(
    model: Path, roles: list[Role], transport: str = "local", **settings: object
) -> Cluster:
    workers = []
    for index, role in enumerate(roles):
        create = prefill_worker.create if role is Role.PREFILL else decode_worker.create
        config = WorkerConfig(
            name=f"{role}-{index}",
            pool=str(role),
            role=role,
            model=str(model),
            cluster_key=KEY,
            transport=transport,
            **({"kv_memory_mb": 16} | settings),  # type: ignore[arg-type]
        )
        workers.append(create(config))
    endpoints = [await worker.start() for worker in workers]
    for worker in workers:
        await worker.update_peers(endpoints)
    gateway = GatewayServer(
        GatewayConfig(
            name="g",
            model=str(model),
            hash_key=hash_key(KEY),
            grpc="127.0.0.1:0",
            http="127.0.0.1:0",
        )
    )
    await gateway.start()
    await gateway.update_members(endpoints)
    async with asyncio.timeout(10):
        while len(gateway.view.workers) < len(workers):
            await asyncio.sleep(0.01)
    return Cluster(gateway, workers, AsyncClient(gateway.grpc_address))


async def stop(cluster: Cluster) -> None:
    await cluster.client.close()
    await cluster.gateway.stop()
    for worker in cluster.workers:
        await worker.stop()
