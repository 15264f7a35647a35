"""Whole clusters on a real Ray: their YAML, load on them, and what is asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from crossdock.client import AsyncClient, Client
from crossdock.deploy import admin
from crossdock.deploy.ray import session
from crossdock.deploy.up import Cluster
from crossdock.proto.errors import Unavailable

YAML = """
metadata: {{name: {name}}}
model: {{id: "{model}"}}
gateway:
  grpc: "127.0.0.1:0"
  http: "127.0.0.1:0"
  drain_s: 2
controller: {{grpc: "127.0.0.1:{admin}"}}
pools:
  prefill:
    role: prefill
    replicas: {prefill}
    kv_memory_mb: 8
    nodes: {{labels: {{{on_p}}}}}
  decode:
    role: decode
    replicas: {decode}
    kv_memory_mb: 8
    nodes: {{labels: {{{on_d}}}}}
"""
PROMPT = list(range(5, 105))
ADMIN_PORTS: dict[str, int] = {}


@contextlib.contextmanager
def serving(spec_path: str | Path, timeout_s: float = 300.0) -> Iterator[Cluster]:
    """A cluster for the length of a `with` block."""
    cluster = Cluster(spec_path)
    try:
        cluster.start(timeout_s)
        yield cluster
    finally:
        cluster.stop()


def leave(cluster: Cluster) -> None:
    """The cluster stays; this process leaves it."""
    cluster._cleanup.pop_all()
    cluster._controller = None
    session.stop_ray()


def write_spec(path: Path, model: Path, prefill=1, decode=1, on_p="", on_d="", name="") -> Path:
    name = f"test{name}-{os.getpid()}"
    # One for each cluster: a restarted controller is found where it was.
    admin_port = ADMIN_PORTS.setdefault(name, free_port())
    path.write_text(
        YAML.format(
            name=name,
            model=model,
            admin=admin_port,
            prefill=prefill,
            decode=decode,
            on_p=on_p,
            on_d=on_d,
        )
    )
    return path


def free_port() -> int:
    """Not of those that the kernel gives to others: one of these may be taken before it is used."""
    while True:
        port = random.randrange(21_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def ask(cluster: Cluster, salt: int = 0, tokens: int = 8, timeout: float = 30.0):
    prompt = [7 + salt % 50, *PROMPT]
    with Client(cluster.grpc) as client:
        return client.generate(
            prompt, max_tokens=tokens, temperature=0, ignore_eos=True, timeout=timeout
        )


def until(condition, timeout_s: float, what: str):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
    return found


def worker_of(cluster: Cluster, pool: str):
    return next(w for w in admin.status(cluster.admin).workers if w.pool == pool)


class Load:
    """Clients that ask one request after another, from a thread of their own."""

    def __init__(self, target: str, clients: int = 4, tokens: int = 24) -> None:
        self.done = 0
        self.errors: list[Exception] = []
        self._target, self._clients, self._tokens = target, clients, tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a request hangs"

    def more(self, count: int) -> None:
        """Waits until `count` more requests ended, well or not."""
        target = self.done + len(self.errors) + count
        until(lambda: self.done + len(self.errors) >= target, 60, f"{count} more requests")

    async def _run(self) -> None:
        async with AsyncClient(self._target) as client:
            await asyncio.gather(*(self._ask(client, i) for i in range(self._clients)))

    async def _ask(self, client: AsyncClient, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            prompt = [5 + number, 5 + turn % 100, *PROMPT]
            try:
                result = await client.generate(
                    prompt, max_tokens=self._tokens, temperature=0, ignore_eos=True, timeout=60
                )
                assert len(result.token_ids) == self._tokens
                self.done += 1
            except Exception as error:
                self.errors.append(error)
                await asyncio.sleep(0.1)


def is_controller(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"ControllerActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def answers_after(cluster: Cluster, old_pid: int) -> bool:
    with contextlib.suppress(Unavailable):
        return not Path(f"/proc/{old_pid}").exists() and cluster.status().converged
    return False


UP = "import sys; from crossdock.deploy.up import up; sys.exit(up(sys.argv[1]))"


def temp_folders(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"=", b"\0").split(b"\0")
        paths = [Path(os.fsdecode(word)).parts for word in words if b"/crossdock-" in word]
        return {
            str(Path(*parts[: i + 1]))
            for parts in paths
            for i, part in enumerate(parts)
            if part.startswith("crossdock-")
        }
    return set()
