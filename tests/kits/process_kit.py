"""A cluster of real processes without Ray, for tests that kill and stop them.

They are forked from one process that has imported what they need, which spares each some seconds;
each serves, and obeys what it is told over its pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import urllib3
from forked import forked
from freeze import freeze

from crossdock.proto.hashing import hash_key
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc

START_S = 60.0
KEY = b"a key of this test cluster"
USED = "crossdock_worker_kv_blocks{"


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
    return found


class Process:
    """A process of this file, and the answers it gives."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.name: str = settings["name"]
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = forked().Process(target=serve, args=(kind, settings, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, **command: Any) -> Any:
        self._pipe.send_bytes(json.dumps(command).encode())
        return self.answer()

    def answer(self) -> Any:
        assert self._pipe.poll(START_S), f"{self.name} does not answer"
        return json.loads(self._pipe.recv_bytes())

    def signal(self, number: int) -> None:
        if number == signal.SIGSTOP:
            freeze(self.pid)
        else:
            os.kill(self.pid, number)

    def end(self) -> None:
        """By force: nothing here is to be tidied up."""
        self._process.kill()
        self._process.join(START_S)
        self._pipe.close()


class WorkerProcess(Process):
    endpoint: WorkerEndpoint
    metrics: str

    def begin(self) -> None:
        described = self.answer()
        self.metrics = described.pop("metrics")
        self.endpoint = WorkerEndpoint(**(described | {"role": Role(described["role"])}))
        self._stub = worker_pb2_grpc.WorkerStub(grpc.insecure_channel(self.endpoint.address))

    def status(self) -> worker_pb2.WorkerStatus:
        request = worker_pb2.GetStatusRequest(check_integrity=True)
        return self._stub.GetStatus(request, timeout=20)

    def used_blocks(self) -> int:
        """From its metrics, which wake nobody: a look at it is not what makes it tidy up."""
        page = urllib3.request("GET", f"http://{self.metrics}/metrics").data.decode()
        lines = [line for line in page.splitlines() if line.startswith(USED)]
        return int(float(next(line for line in lines if 'state="used"' in line).split()[-1]))


class Cluster:
    """Workers and gateways by name; whoever is killed can be started again."""

    def __init__(self, model: Path, prefills: int = 2, decodes: int = 2, **settings: Any) -> None:
        self._model, self._settings = str(model), settings
        self.workers: dict[str, WorkerProcess] = {}
        self.gateways: list[Process] = []
        self.start_workers(
            *(f"prefill-{i}" for i in range(prefills)), *(f"decode-{i}" for i in range(decodes))
        )

    def of(self, role: str) -> list[WorkerProcess]:
        return [worker for name, worker in self.workers.items() if name.startswith(role)]

    def start_workers(self, *names: str) -> None:
        for name in names:
            role = name.rpartition("-")[0]
            common = {"name": name, "role": role, "model": self._model}
            self.workers[name] = WorkerProcess("worker", **(common | self._settings))
        for name in names:
            self.workers[name].begin()
        self.tell()

    def start_gateway(self) -> str:
        """Returns its gRPC address, once it is ready. The newest serves; others may be dead."""
        same = {name: self._settings[name] for name in ("block_size",) if name in self._settings}
        gateway = Process("gateway", name=f"g{len(self.gateways)}", model=self._model, **same)
        self.gateways.append(gateway)
        self.grpc, self.http = gateway.answer()
        gateway.ask(members=self._members())
        return self.grpc

    def tell(self) -> None:
        members = self._members()
        for worker in self.workers.values():
            worker.ask(members=members)

    def everywhere(self, **command: Any) -> None:
        for worker in self.workers.values():
            worker.ask(**command)

    def _members(self) -> list[dict[str, str]]:
        return [asdict(worker.endpoint) for worker in self.workers.values()]

    def kill(self, name: str) -> None:
        self.workers[name].signal(signal.SIGKILL)
        self.workers.pop(name).end()

    def freed_within(self, seconds: float, since: float) -> None:
        """No block is used and no lease open at any worker, `seconds` after `since` (monotonic)."""
        for worker in self.workers.values():
            left = max(0.0, since + seconds - time.monotonic())
            until(lambda w=worker: w.used_blocks() == 0, left, f"{worker.name} is empty")
        for worker in self.workers.values():
            status = worker.status()
            assert (status.integrity_error, len(status.leases)) == ("", 0), worker.name
            assert (status.load.waiting, status.load.running) == (0, 0), worker.name

    def close(self) -> None:
        for process in [*self.gateways, *self.workers.values()]:
            process.end()


# -- the program ---------------------------------------------------------------------------------


class Hand:
    """The test's hand in a worker: its pace, and whether reads begin."""

    def __init__(self) -> None:
        self.pace_s = 0.0
        self.reads = threading.Event()
        self.reads.set()
        self._pool = ThreadPoolExecutor(64)

    def lay_on(self) -> None:
        from crossdock.engine.native.runner import ModelRunner
        from crossdock.kvtransfer import registry
        from crossdock.kvtransfer.transport import Handle, HandleState
        from crossdock.worker import server

        run = ModelRunner.run

        def paced(runner: Any, plan: Any) -> Any:
            time.sleep(self.pace_s)
            return run(runner, plan)

        def late(post: Callable[..., Handle], arguments: Any) -> Handle:
            handle = Handle()

            def read() -> None:
                self.reads.wait(START_S)
                real = post(*arguments)
                while not real.terminal:
                    time.sleep(0.002)
                if real.state is HandleState.DONE:
                    handle.finish()
                else:
                    handle.fail(str(real.error))

            self._pool.submit(read)
            return handle

        def made(*arguments: Any, **named: Any) -> Any:
            transport = registry.create_transport(*arguments, **named)
            post = transport.read_blocks

            def read_blocks(*asked: Any) -> Handle:
                return post(*asked) if self.reads.is_set() else late(post, asked)

            transport.read_blocks = read_blocks  # type: ignore[method-assign]
            return transport

        ModelRunner.run = paced  # type: ignore[method-assign]
        server.create_transport = made  # type: ignore[attr-defined]

    def obey(self, command: dict[str, Any]) -> None:
        if "pace_s" in command:
            self.pace_s = command["pace_s"]
        if "reads" in command:
            (self.reads.set if command["reads"] else self.reads.clear)()


async def serve_worker(settings: dict[str, Any], pipe: Connection) -> None:
    from crossdock.decode import role as decode_worker
    from crossdock.prefill import role as prefill_worker
    from crossdock.worker.config import WorkerConfig

    hand = Hand()
    hand.lay_on()
    role = Role(settings.pop("role"))
    create = prefill_worker.create if role is Role.PREFILL else decode_worker.create
    server = create(WorkerConfig(pool=str(role), role=role, cluster_key=KEY, **settings))
    endpoint = await server.start()
    say(pipe, asdict(endpoint) | {"metrics": server.description.metrics_address})
    async for command in commands(pipe):
        hand.obey(command)
        if "members" in command:
            await server.update_peers(endpoints(command["members"]))
        say(pipe, True)


async def serve_gateway(settings: dict[str, Any], pipe: Connection) -> None:
    from crossdock.router.gateway import GatewayConfig, GatewayServer

    server = GatewayServer(
        GatewayConfig(hash_key=hash_key(KEY), grpc="127.0.0.1:0", http="127.0.0.1:0", **settings)
    )
    await server.start()
    say(pipe, [server.grpc_address, server.http_address])
    async for command in commands(pipe):
        members = endpoints(command["members"])
        await server.update_members(members)
        async with asyncio.timeout(START_S):
            while len(server.view.workers) < len(members):
                await asyncio.sleep(0.01)
        say(pipe, True)


def endpoints(members: list[dict[str, str]]) -> list[WorkerEndpoint]:
    return [WorkerEndpoint(**(each | {"role": Role(each["role"])})) for each in members]


async def commands(pipe: Connection) -> AsyncIterator[dict[str, Any]]:
    with contextlib.suppress(EOFError):
        while True:
            yield json.loads(await asyncio.to_thread(pipe.recv_bytes))


def say(pipe: Connection, value: object) -> None:
    pipe.send_bytes(json.dumps(value).encode())


def serve(kind: str, settings: dict[str, Any], pipe: Connection) -> None:
    kinds = {"worker": serve_worker, "gateway": serve_gateway}
    asyncio.run(kinds[kind](settings, pipe))
