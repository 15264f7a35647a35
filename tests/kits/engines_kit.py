"""A gateway and workers in this process over real gRPC and shared memory, on any kind of engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from roles_kit import undisturbed

from crossdock.decode import role as decode_worker
from crossdock.deploy.home import crossdock_home
from crossdock.engine import registry
from crossdock.engine.simulated import TEXT_IDS
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.prefill import role as prefill_worker
from crossdock.proto.hashing import hash_key
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2_grpc
from crossdock.router.gateway import GatewayConfig, GatewayServer
from crossdock.worker.config import WorkerConfig
from crossdock.worker.server import WorkerServer

registry.ENGINES["uneven"] = "uneven_engine"
KEY = b"a key of this test cluster"


def simulated(kind: str = "simulated", **settings: Any) -> Any:
    """An `engine` of the YAML."""
    return registry.settings_of(kind)(kind=kind, **settings)


def expected(prompt: Sequence[int], tokens: int, **sampling: Any) -> list[int]:
    """What the simulated engine answers on the byte tokenizer, undisturbed."""
    return undisturbed(prompt, tokens, TEXT_IDS, **sampling)


@dataclass
class EngineRig:
    gateway: GatewayServer
    stub: inference_pb2_grpc.InferenceStub
    text: TextModel
    workers: list[WorkerServer] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.gateway.http_address}"

    async def settled(self) -> None:
        """Returns once no worker holds anything; fails where a block is unaccounted for."""
        for worker in self.workers:
            async with asyncio.timeout(20):
                while (status := await worker.status(check_integrity=True)).used_blocks:
                    assert status.integrity_error == ""
                    await asyncio.sleep(0.01)
            assert (status.integrity_error, list(status.leases)) == ("", [])


@asynccontextmanager
async def start_engines(
    *roles: Role, model: str = "simulated", engine: Any = None, **settings: Any
) -> AsyncIterator[EngineRig]:
    """One worker for each role; `settings` are of WorkerConfig, block_size also the gateway's."""
    settings = {"block_size": 8, "chunk_tokens": 32, "kv_memory_mb": 64} | settings
    async with AsyncExitStack() as stack:
        workers = []
        for index, role in enumerate(roles):
            config = WorkerConfig(
                name=f"{role}-{index}",
                pool=str(role),
                role=role,
                model=model,
                cluster_key=KEY,
                transport="local",
                engine=engine or simulated(),
                **settings,
            )
            create = prefill_worker.create if role is Role.PREFILL else decode_worker.create
            workers.append(create(config))
            stack.push_async_callback(workers[-1].stop)
            await workers[-1].start()
        endpoints = [worker.endpoint for worker in workers]
        for worker in workers:
            await worker.update_peers(endpoints)
        local = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}
        gateway = GatewayServer(
            GatewayConfig("g", model, hash_key(KEY), block_size=settings["block_size"], **local)
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        await gateway.update_members(endpoints)
        async with asyncio.timeout(20):
            while len(gateway.view.workers) < len(workers):
                await asyncio.sleep(0.01)
        channel = grpc.aio.insecure_channel(gateway.grpc_address)
        await stack.enter_async_context(channel)
        stub = inference_pb2_grpc.InferenceStub(channel)
        yield EngineRig(gateway, stub, load_text(resolve(model, crossdock_home())), workers)
