"""One model of vLLM's in Crossdock's pools, beside vLLM's own prefill and decode over NIXL.

Both run vLLM's CPU build, each with one prefill and one decode engine of one core, and take the
same token ids in turn, round by round in one run. vLLM's two servers hand KV over with
NixlConnector, behind the proxy of vllm_proxy.py; as they use a core each when they are idle, they
are stopped (SIGSTOP) while Crossdock's round runs.

    make bench-vllm BENCH_ARGS="--requests 24 --rounds 2 --json FILE"    # installs what it needs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters import DEFAULT_MODEL, Cluster, free_ports, spec
from clusters import running as running_cluster
from gateway_peer import cpu_s_of
from gateway_peer import running as running_processes
from throughput import add_load, measure, pooled, show_figures

from crossdock.bench.run import describe_machine
from crossdock.deploy import admin
from crossdock.deploy.home import crossdock_home
from crossdock.model.export import export_model
from crossdock.proto.errors import CrossdockError

HERE = Path(__file__).resolve().parent
POOLS = """\
  prefill: {role: prefill, replicas: 1, resources: {cpus: 1}, engine: {kind: vllm}}
  decode:  {role: decode,  replicas: 1, resources: {cpus: 1}, engine: {kind: vllm}}
"""
CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
KV_GB = 1  # of each engine's pool
IDLE_S = 10.0  # for which CPU of idle workers is counted
READY_S = 300.0


@dataclass(frozen=True)
class Peer:
    """vLLM's servers and the proxy before them, each with its process group."""

    url: str
    prefill: int
    decode: int
    proxy: int

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While the block runs, none of its processes does."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for group in (self.prefill, self.decode, self.proxy):
            os.killpg(group, number)


@dataclass(frozen=True)
class Server:
    """A process in a group of its own, whose output is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def await_ready(self, url: str, limit_s: float) -> None:
        """Until it answers there. Raises RuntimeError once it has ended, TimeoutError after
        `limit_s`; both with what it said last."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"{self.log.name} ended with status {code}:\n{self._said()}")
            time.sleep(0.5)
        raise TimeoutError(f"{self.log.name}: no answer in {limit_s:g} s; it said:\n{self._said()}")

    def _said(self) -> str:
        return self.log.read_text()[-2000:]


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, **variables: str) -> Iterator[Server]:
    """A server, until the block is left."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
        try:
            yield Server(process, log)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def peer(model: Path, block_size: int, logs: Path) -> Iterator[Peer]:
    """Ready to answer. Raises as Server.await_ready."""
    ports = free_ports(5)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with contextlib.ExitStack() as stack:
        engines = []
        for core, name in enumerate(("prefill", "decode")):
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", str(model), "--served-model-name", DEFAULT_MODEL]
            command += ["--dtype", "float32", "--enforce-eager", "--port", str(ports[core])]
            command += ["--block-size", str(block_size)]
            command += ["--kv-transfer-config", json.dumps(CONNECTOR)]
            variables = {
                "VLLM_CPU_OMP_THREADS_BIND": str(core),
                "VLLM_CPU_KVCACHE_SPACE": str(KV_GB),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports[2 + core]),
                "VLLM_NO_USAGE_STATS": "1",
            }
            engines.append(stack.enter_context(started(command, logs / name, **variables)))
        for url, engine in zip(urls, engines):
            engine.await_ready(f"{url}/health", READY_S)
        proxy = [sys.executable, str(HERE / "vllm_proxy.py")]
        proxy += ["--port", str(ports[4]), "--prefill", urls[0], "--decode", urls[1]]
        front = stack.enter_context(started(proxy, logs / "proxy"))
        front.await_ready(f"{urls[4]}/v1/models", READY_S)
        yield Peer(urls[4], engines[0].pid, engines[1].pid, front.pid)


def await_whole(cluster: Cluster) -> None:
    """Until all its members serve: one that the peer's turn kept from answering for too long has
    been replaced meanwhile. Raises TimeoutError."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        with contextlib.suppress(CrossdockError):
            if admin.status(cluster.admin).converged:
                return
        time.sleep(0.5)
    raise TimeoutError(f"the cluster was not whole again in {READY_S:g} s")


def workers_of(cluster: Cluster) -> dict[str, int]:
    """Process ids, by pool."""
    return {each.pool: each.pid for each in admin.status(cluster.admin).workers}


def idle_cpu(roots: dict[str, int]) -> dict[str, float]:
    """Share of a core that each of these processes, with its children, takes."""
    before = {name: cpu_s_of(running_processes(), [pid]) for name, pid in roots.items()}
    time.sleep(IDLE_S)
    return {
        name: (cpu_s_of(running_processes(), [pid]) - before[name]) / IDLE_S
        for name, pid in roots.items()
    }


def compare(model: Path, options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    yaml = spec("vllm-beside", POOLS, str(model))
    yaml += f"kv: {{block_size: {options.block_size}}}\n"
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "CROSSDOCK_EVENT_LISTENER": "vllm_forward:reached",
        "CROSSDOCK_FORWARD": str(logs),
    }
    with (
        running_cluster(yaml, READY_S, options.verbose, env) as ours,
        peer(model, options.block_size, logs) as theirs,
    ):

        @contextlib.contextmanager
        def alone() -> Iterator[None]:
            with theirs.stopped():
                await_whole(ours)
                yield

        idle = {"peer": idle_cpu({"prefill": theirs.prefill, "decode": theirs.decode})}
        with alone():
            idle["crossdock"] = idle_cpu(workers_of(ours))
        endpoints = {"crossdock": f"grpc://{ours.grpc}", "peer": theirs.url}
        turns = {"crossdock": alone, "peer": contextlib.nullcontext}
        runs = measure(endpoints, options, lambda name: turns[name]())
        steps = {
            pool: json.loads(file.read_text())
            for pool, pid in workers_of(ours).items()
            if (file := logs / f"{pid}.json").exists()  # else it has not computed anything yet
        }
    results = {name: pooled(each) for name, each in runs.items()}
    results["crossdock"]["step_s"] = steps
    return {name: {**each, "idle_cpu": idle[name]} for name, each in results.items()}


def show(results: dict[str, dict[str, Any]]) -> None:
    show_figures(results)
    for name, each in results.items():
        shares = ", ".join(f"{pool} {share:.1%}" for pool, share in each["idle_cpu"].items())
        print(f"{name}: of a core when idle: {shares}; {each['failed']} failed")
    for pool, spent in results["crossdock"]["step_s"].items():
        parts = [f"{part} {spent[part] / spent['step']:.1%}" for part in spent if part != "step"]
        print(f"of the {spent['step']:.1f} s of {pool}'s steps: {', '.join(parts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a known model, or a file")
    parser.add_argument("--block-size", type=int, default=32, help="tokens; of both")
    parser.add_argument("--verbose", action="store_true", help="shows what our cluster says")
    add_load(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = export_model(options.model, Path(scratch, DEFAULT_MODEL), crossdock_home())
        results = compare(model, options, Path(scratch))
    show(results)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"machine": describe_machine(), "config": settings, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if any(each["failed"] for each in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
