"""A real gateway on real ports before fake workers, for the tests of gRPC, HTTP and dispatch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_worker import FakeWorker
from trust_kit import credentials

from crossdock.proto.hashing import BlockHasher
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import inference_pb2_grpc
from crossdock.router.gateway import GatewayConfig, GatewayServer
from crossdock.router.served import Served
from crossdock.router.serving import Rule, ServedModel, Serving

FINISH = pb.FinishReason
HASH_KEY = b"the key of these tests"
PROMPT = list(range(10, 50))


@dataclass
class Rig:
    gateway: GatewayServer
    stub: inference_pb2_grpc.InferenceStub
    channel: Any
    prefills: list[FakeWorker] = field(default_factory=list)
    decodes: list[FakeWorker] = field(default_factory=list)
    colocated: list[FakeWorker] = field(default_factory=list)

    @property
    def workers(self) -> list[FakeWorker]:
        return [*self.prefills, *self.decodes, *self.colocated]

    @property
    def only(self) -> Served:
        """The gateway's one model."""
        (served,) = self.gateway._served.values()
        return served

    @property
    def url(self) -> str:
        return f"http://{self.gateway.http_address}"

    @property
    def idle(self) -> bool:
        return not self.gateway.active_requests and not any(w.running for w in self.workers)

    async def members(self, *workers: FakeWorker) -> None:
        """Tells the gateway its membership (all workers by default) and waits for the links."""
        told = workers or self.workers
        await self.gateway.update_members([worker.endpoint for worker in told])
        names = {worker.name: worker.incarnation.hex() for worker in told}
        await until(lambda: names.items() <= self._connected().items())

    def _connected(self) -> dict[str, str]:
        views = [served.view for served in self.gateway._all()]
        return {n: w.facts.incarnation for view in views for n, w in view.workers.items()}

    def hashes(self, token_ids: list[int]) -> list[bytes]:
        """What this gateway calls the full blocks of a prompt that has no salt."""
        hasher = BlockHasher(HASH_KEY, self.gateway.config.block_size)
        return hasher.chain(token_ids, hasher.root(self.gateway.view.layout_hash))

    def metric(self, name: str, **labels: str) -> float:
        return self.gateway.metrics.registry.get_sample_value(f"crossdock_{name}", labels) or 0.0

    def timed(self, name: str, **labels: str) -> float:
        """Of the gateway's one model."""
        return self.metric(name, model=self.only.name, **labels)


@asynccontextmanager
async def start_rig(
    model: Path,
    *,
    prefills: int = 1,
    decodes: int = 1,
    colocated: int = 0,
    num_blocks: int = 1000,
    certified: bool = False,
    chunk_tokens: int = 0,
    max_batch: int = 0,
    **config: Any,
) -> AsyncIterator[Rig]:
    """`certified`: gateway and workers speak mutual TLS."""
    async with AsyncExitStack() as stack:

        async def workers(prefix: str, role: Role, count: int) -> list[FakeWorker]:
            proof = partial(credentials, str(role), prefix) if certified else None
            made = [
                FakeWorker(f"{prefix}-{i}", role, num_blocks=num_blocks, certified=proof)
                for i in range(count)
            ]
            for worker in made:
                worker.chunk_tokens, worker.max_batch = chunk_tokens, max_batch
            return [await stack.enter_async_context(worker) for worker in made]

        local = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}
        gateway = GatewayServer(
            GatewayConfig("gateway-0", str(model), HASH_KEY, **(local | config)),
            credentials("gateway", "gateway-0") if certified else None,
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        channel = grpc.aio.insecure_channel(gateway.grpc_address)
        await stack.enter_async_context(channel)
        rig = Rig(
            gateway,
            inference_pb2_grpc.InferenceStub(channel),
            channel,
            await workers("prefill", Role.PREFILL, prefills),
            await workers("decode", Role.DECODE, decodes),
            await workers("colocated", Role.COLOCATED, colocated),
        )
        if rig.workers:
            await rig.members()
        yield rig


@asynccontextmanager
async def start_models(
    models: Mapping[str, ServedModel],
    routes: Mapping[str, tuple[Rule, ...]] | None = None,
    **config: Any,
) -> AsyncIterator[Rig]:
    """A gateway of several models, a prefill and a decode worker before each: MODEL-p, MODEL-d."""
    serving = Serving(models, routes or {})
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(
            start_rig(Path(), prefills=0, decodes=0, serving=serving, **config)
        )
        for name in models:
            for end, role, workers in (
                ("p", Role.PREFILL, rig.prefills),
                ("d", Role.DECODE, rig.decodes),
            ):
                worker = FakeWorker(f"{name}-{end}", role, model=name)
                workers.append(await stack.enter_async_context(worker))
        await rig.members()
        yield rig


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Waits for what other tasks are about to make true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.002)


def ask(token_ids: list[int] | None = None, *, n: int = 1, **sampling: Any) -> pb.GenerateRequest:
    """A request by token ids, which the fake workers echo."""
    ids = PROMPT if token_ids is None else token_ids
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), n=n, sampling=pb.SamplingParams(**sampling)
    )


async def collect(call: Any) -> list[pb.GenerateResponse]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def ids_of(responses: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    return [t for r in responses if r.index == index for t in r.token_ids]


def text_of(responses: list[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(r.text for r in responses if r.index == index)


async def refusal(rig: Rig, request: Any, **call: Any) -> grpc.aio.AioRpcError:
    """How Generate and GenerateUnary refuse a request: alike."""
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await collect(rig.stub.Generate(request, **call))
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await rig.stub.GenerateUnary(request, **call)
    assert streamed.value.code() == unary.value.code()
    assert streamed.value.details() == unary.value.details()
    return streamed.value


def trailer(error: grpc.aio.AioRpcError, name: str) -> str | None:
    return dict(error.trailing_metadata() or ()).get(name)
