"""Clusters that a benchmark starts for itself, one after another, with `crossdock up`."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from crossdock.deploy.spec import ClusterSpec

DEFAULT_MODEL = "smollm2-135m-instruct"
READY = re.compile(r"READY grpc=(\S+) http=(\S+)")
DISAGGREGATED = """\
  prefill: {role: prefill, replicas: 1, resources: {cpus: 1}}
  decode:  {role: decode,  replicas: 1, resources: {cpus: 1}}
"""


def colocated(chunk_tokens: int) -> str:
    """Two workers of both phases; `chunk_tokens` of prompts are the most one step computes."""
    return f"""\
  both: {{role: colocated, replicas: 2, chunk_tokens: {chunk_tokens}, resources: {{cpus: 1}}}}
"""


@dataclass(frozen=True)
class Cluster:
    grpc: str  # host:port
    http: str
    admin: str
    startup_s: float


def spec(name: str, pools: str, model: str = DEFAULT_MODEL) -> str:
    grpc, http, controller = free_ports(3)
    return f"""\
apiVersion: crossdock/v1
kind: Cluster
metadata: {{name: {name}}}
model: {{id: {model}, dtype: auto}}
gateway: {{replicas: 1, grpc: "127.0.0.1:{grpc}", http: "127.0.0.1:{http}"}}
controller: {{grpc: "127.0.0.1:{controller}"}}
pools:
{pools}"""


def free_ports(count: int) -> list[int]:
    """Not of those that the kernel gives to others: one of these may be taken before it is used."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = random.randrange(21_000, 32_000)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
        return found


@contextlib.contextmanager
def running(
    yaml: str,
    ready_s: float = 180.0,
    verbose: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """The cluster of this YAML, from READY until the block is left. Raises TimeoutError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "crossdock.cli", "up", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        printed: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, printed, verbose), daemon=True)
        reader.start()
        try:
            grpc, http = _ready(printed, started + ready_s)
            address = ClusterSpec.parse(yaml).controller.grpc
            yield Cluster(grpc, http, address, time.monotonic() - started)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(10)


def _read(process: subprocess.Popen[str], printed: queue.Queue[str | None], verbose: bool) -> None:
    for line in process.stdout or ():
        if verbose:
            print("   |", line, end="", file=sys.stderr)
        printed.put(line)
    printed.put(None)


def _ready(printed: queue.Queue[str | None], until: float) -> tuple[str, str]:
    said: list[str] = []
    while True:
        try:
            line = printed.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("no READY in time; it said:\n" + "".join(said[-20:])) from None
        if line is None:
            raise RuntimeError("crossdock up ended before READY:\n" + "".join(said[-20:]))
        said.append(line)
        if found := READY.search(line):
            return found[1], found[2]
