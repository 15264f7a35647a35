"""What mutual TLS costs a gateway: its CPU time with it over that without, in one run.

    python benchmarks/tls_cost.py --json report.json

Two times a gateway, a prefill and a decode worker (simulated, one process each), the ones with
certificates and the others without; the same load on both in turn, round by round. Clients speak
plain gRPC to either, so what differs is the path of frames between gateway and workers. Loops are
uvloop's, as Ray gives them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from crossdock.client import AsyncClient
from crossdock.deploy.authority import Authority
from crossdock.engine.profiles import Profile
from crossdock.engine.simulated import Settings
from crossdock.proto.hashing import hash_key
from crossdock.proto.identity import Credentials
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.worker.config import WorkerConfig

KEY = b"the key of this benchmark's cluster"
START_S = 60.0
PROMPT = list(range(5, 37))


@dataclass(frozen=True)
class Side:
    """One gateway and its workers."""

    grpc: str
    pipe: Connection

    def cpu_s(self) -> float:
        """CPU seconds of the gateway's process until now."""
        return float(ask(self.pipe, "cpu"))


def ask(pipe: Connection, question: Any) -> Any:
    pipe.send(question)
    if not pipe.poll(START_S):
        raise TimeoutError("a process of the benchmark does not answer")
    return pipe.recv()


def proof(secure: bool, role: str) -> Credentials | None:
    return Authority(KEY, "benchmark").credentials(role, f"{role}-0") if secure else None


async def worker(role: Role, secure: bool, step_s: float, pipe: Connection) -> None:
    from crossdock.decode import role as decode_worker
    from crossdock.prefill import role as prefill_worker

    create = prefill_worker.create if role is Role.PREFILL else decode_worker.create
    profile = Profile(kv_bytes_per_token=64, prefill_s=step_s, decode_s=step_s)
    config = WorkerConfig(
        name=f"{role}-0",
        pool=str(role),
        role=role,
        model="simulated",
        engine=Settings(profile=profile),
        cluster_key=KEY,
        transport="local",
        kv_memory_mb=16,
        max_batch=512,
        chunk_tokens=4096,
    )
    server = create(config, proof(secure, str(role)))
    pipe.send(await server.start())
    await server.update_peers(await asyncio.to_thread(pipe.recv))
    pipe.send(True)
    await asyncio.Event().wait()


async def gateway(secure: bool, members: list[WorkerEndpoint], pipe: Connection) -> None:
    from crossdock.router.gateway import GatewayConfig, GatewayServer

    config = GatewayConfig(
        "gateway-0", "simulated", hash_key(KEY), grpc="127.0.0.1:0", http="127.0.0.1:0"
    )
    server = GatewayServer(config, proof(secure, "gateway"))
    await server.start()
    await server.update_members(members)
    while not server.ready:
        await asyncio.sleep(0.01)
    pipe.send(server.grpc_address)
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())


def serve(kind: str, *arguments: Any) -> None:
    uvloop.run({"worker": worker, "gateway": gateway}[kind](*arguments))


@contextlib.contextmanager
def running(secure: bool, step_s: float) -> Iterator[Side]:
    """The processes of one side."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start(kind: str, *arguments: Any) -> Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(kind, *arguments, theirs), daemon=True)
        process.start()
        started.append(process)
        return ours

    def hear(pipe: Connection) -> Any:
        if not pipe.poll(START_S):
            raise TimeoutError("a process of the benchmark did not start")
        return pipe.recv()

    try:
        pipes = [start("worker", role, secure, step_s) for role in (Role.PREFILL, Role.DECODE)]
        members = [hear(pipe) for pipe in pipes]
        for pipe in pipes:
            ask(pipe, members)
        pipe = start("gateway", secure, members)
        yield Side(hear(pipe), pipe)
    finally:
        for process in started:
            process.kill()
            process.join(START_S)


async def load(grpc: str, requests: int, concurrency: int, tokens: int) -> None:
    """`requests` streams of `tokens` tokens, `concurrency` at any time."""
    numbers = iter(range(requests))
    async with AsyncClient(grpc) as client:

        async def ask_on() -> None:
            for number in numbers:
                prompt = [5 + number % 200, *PROMPT]
                fields = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
                got = 0
                async for chunk in client.stream(prompt, timeout=120, **fields):  # type: ignore[arg-type]
                    got += len(chunk.token_ids)
                assert got == tokens, f"{got} tokens of {tokens}"

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(ask_on())


def measure(side: Side, options: argparse.Namespace) -> float:
    """The gateway's CPU, microseconds a token."""
    before = side.cpu_s()
    asyncio.run(load(side.grpc, options.requests, options.concurrency, options.tokens))
    return 1e6 * (side.cpu_s() - before) / (options.requests * options.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10.0, help="time of an engine's step")
    parser.add_argument("--json", help="write the report here")
    options = parser.parse_args()
    found: dict[bool, list[float]] = {False: [], True: []}
    with (
        running(False, options.step_ms / 1e3) as plain,
        running(True, options.step_ms / 1e3) as tls,
    ):
        sides = {False: plain, True: tls}
        for number in range(options.rounds + 1):
            for secure in (False, True) if number % 2 else (True, False):
                micros = measure(sides[secure], options)
                if number:  # the first warms up
                    found[secure].append(micros)
    ratios = [tls / plain for plain, tls in zip(found[False], found[True], strict=True)]
    report = {
        "machine": platform.processor() or platform.machine(),
        "load": {name: value for name, value in vars(options).items() if name != "json"},
        "plain_us_per_token": found[False],
        "tls_us_per_token": found[True],
        "ratio_of_medians": statistics.median(found[True]) / statistics.median(found[False]),
        "median_of_ratios": statistics.median(ratios),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
