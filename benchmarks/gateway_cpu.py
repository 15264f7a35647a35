"""What a streamed request costs its gateway: CPU seconds of the gateway's process per request.

One gateway and two simulated workers (prefill and decode, or two colocated ones), each a process
of its own; the client of this process keeps `--concurrency` streamed requests of `--tokens` tokens
under way, over HTTP and over gRPC in turn. The gateway's loop is uvloop's, as Ray gives it.

    python benchmarks/gateway_cpu.py
    python benchmarks/gateway_cpu.py --profile /tmp/gateway.pstats   # where the seconds go
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import uvloop

from crossdock.model.store import SIMULATED
from crossdock.proto.hashing import hash_key
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import inference_pb2, inference_pb2_grpc

KEY = b"a key of this benchmark's cluster"
PROMPT_TOKENS = 64
ROLES = {"split": ("prefill", "decode"), "colocated": ("colocated", "colocated")}
STEP_S = 0.02  # of a decode step of the simulated engine

Serving = Callable[..., Coroutine[Any, Any, None]]  # takes a pipe, and arguments


async def worker(
    pipe: Connection, name: str, role: str, model: str = SIMULATED, home: str = os.devnull
) -> None:
    from crossdock.decode import role as decode
    from crossdock.engine.profiles import Profile
    from crossdock.engine.simulated import Settings
    from crossdock.prefill import role as prefill
    from crossdock.worker.config import WorkerConfig

    engine = Settings(profile=Profile(decode_s=STEP_S, prefill_s=0.002, kv_bytes_per_token=64))
    config = WorkerConfig(
        name=name, pool=role, role=Role(role), cluster_key=KEY, model=model, engine=engine,
        home=Path(home), transport="local", max_batch=512, chunk_tokens=2048, kv_memory_mb=64,
    )  # fmt: skip
    server = (prefill if role == "prefill" else decode).create(config)
    pipe.send(asdict(await server.start()))
    async for members in told(pipe):
        await server.update_peers(members)
        pipe.send(True)


async def gateway(
    pipe: Connection, profile: str, model: str = SIMULATED, home: str = os.devnull
) -> None:
    from crossdock.router import garbage
    from crossdock.router.gateway import GatewayConfig, GatewayServer

    key, anywhere = hash_key(KEY), "127.0.0.1:0"
    server = GatewayServer(
        GatewayConfig("g", model, key, home=Path(home), grpc=anywhere, http=anywhere)
    )
    await server.start()
    garbage.settle()
    pipe.send([server.grpc_address, server.http_address])
    async for members in told(pipe):
        if members is None:
            pipe.send(time.process_time())
            continue
        await server.update_members(members)
        while len(server.view.workers) < len(members):
            await asyncio.sleep(0.01)
        pipe.send(True)


async def told(pipe: Connection) -> AsyncIterator[Any]:
    while True:
        command = await asyncio.to_thread(pipe.recv)
        if command == "end":
            return
        yield command


def serve(kind: str | Serving, pipe: Connection, *arguments: Any) -> None:
    main: Serving = (worker if kind == "worker" else gateway) if isinstance(kind, str) else kind
    if kind == "gateway" and arguments[0]:
        import cProfile

        profiler = cProfile.Profile(time.thread_time)  # not of others on the machine
        profiler.runcall(uvloop.run, main(pipe, *arguments))
        profiler.dump_stats(arguments[0])
    else:
        uvloop.run(main(pipe, *arguments))


class Child:
    """A process of its own. `kind`: "worker", "gateway", or what is to run there."""

    def __init__(self, kind: str | Serving, *arguments: Any) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=serve, args=(kind, theirs, *arguments), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def ask(self, command: Any) -> Any:
        self.pipe.send(command)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self._process.join(10)
        self._process.kill()


class HttpClient:
    """Requests over connections that are kept; reads bytes and parses nothing but the end."""

    def __init__(self, address: str, tokens: int) -> None:
        self._host, _, self._port = address.rpartition(":")
        body = {
            "model": "simulated", "prompt": [], "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        self._body = body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, prompt: list[int]) -> None:
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._host, int(self._port))
        body = json.dumps(self._body | {"prompt": prompt}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(65536)
            assert data, "the gateway closed the connection"
            tail = (tail + data)[-40:]
        assert b"[DONE]" in tail, tail
        self._idle.append((reader, writer))

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


class GrpcClient:
    def __init__(self, address: str, tokens: int) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._sampling = inference_pb2.SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0
        )

    async def __call__(self, prompt: list[int]) -> None:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt), sampling=self._sampling
        )
        finished = False
        async for response in self._stub.Generate(request):
            finished = bool(response.finish_reason)
        assert finished

    async def close(self) -> None:
        await self._channel.close()


async def load(client: Any, requests: int, concurrency: int, first: int) -> None:
    left = iter(range(requests))

    async def stream() -> None:
        for number in left:
            await client([(first + number) % 97 + 32, *range(32, 31 + PROMPT_TOKENS)])

    await asyncio.gather(*(stream() for _ in range(concurrency)))


async def measure(
    options: argparse.Namespace, gateway: Child, addresses: list[str]
) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for name, kind, address in (
            ("http", HttpClient, addresses[1]),
            ("grpc", GrpcClient, addresses[0]),
        ):
            if options.only and name != options.only:
                continue
            client = kind(address, options.tokens)
            await load(client, options.concurrency, options.concurrency, number)  # connections
            before, began = gateway.ask(None), time.monotonic()
            await load(client, options.requests, options.concurrency, number)
            cpu, wall = gateway.ask(None) - before, time.monotonic() - began
            await client.close()
            found.setdefault(name, []).append(1000 * cpu / options.requests)
            print(
                f"{name}: {found[name][-1]:.2f} ms of gateway CPU a request "
                f"({options.requests} of {options.tokens} tokens in {wall:.1f} s, "
                f"{100 * cpu / wall:.0f} % of a core)",
                flush=True,
            )
    return {name: min(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", choices=tuple(ROLES), default="split")
    parser.add_argument("--only", choices=("http", "grpc"))
    parser.add_argument("--profile", default="", help="where to write cProfile's statistics")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["CROSSDOCK_HOME"] = home
        workers = [
            Child("worker", f"{role}-{i}", role) for i, role in enumerate(ROLES[options.workers])
        ]
        described = [child.pipe.recv() for child in workers]
        members = [WorkerEndpoint(**(each | {"role": Role(each["role"])})) for each in described]
        front = Child("gateway", options.profile)
        addresses = front.pipe.recv()
        for child in (*workers, front):
            child.ask(members)
        try:
            best = asyncio.run(measure(options, front, addresses))
        finally:
            for child in (front, *workers):
                child.end()
    print(json.dumps({f"{name}_ms": round(value, 3) for name, value in best.items()}))
    if options.json:
        options.json.write_text(json.dumps(best))


if __name__ == "__main__":
    main()
