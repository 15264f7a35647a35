"""What a streamed chat costs its gateway, beside another front end under the same load in one run.

CPU time, user and system, of each front end's processes per request: texts of about 200 words,
64 tokens each, 256 connections that send their next request when one is answered. Both tokenize
the same texts with the same tokenizer; ours stands before a simulated prefill and decode worker of
20 ms a step. The peer runs already: it is told by its URL and its process. For NVIDIA Dynamo, in an
environment of its own (`pip install ai-dynamo==1.6.1`):

    python benchmarks/gateway_peer.py --write-peer-model /tmp/peer-model
    export DYN_FILE_KV=/tmp/peer-kv DYN_DISCOVERY_BACKEND=file DYN_REQUEST_PLANE=tcp
    export DYN_EVENT_PLANE=zmq DYN_EVENT_PLANE_HOST=127.0.0.1 DYN_TCP_RPC_HOST=127.0.0.1
    export DYN_TCP_RESPONSE_STREAM_HOST=127.0.0.1 DYN_LOG=error
    python -m dynamo.frontend --router-mode kv --http-host 127.0.0.1 --http-port 8300 &
    MOCKER="python -m dynamo.mocker --model-path /tmp/peer-model --model-name smollm2-135m-instruct"
    MOCKER="$MOCKER --max-num-seqs 512 --planner-profile-data /tmp/peer-model/pace.npz"
    $MOCKER --disaggregation-mode prefill --bootstrap-ports 8301 &
    $MOCKER --disaggregation-mode decode &
    python benchmarks/gateway_peer.py --peer-url http://127.0.0.1:8300 --peer-pid PID --json FILE

Without a peer it measures ours alone; --profile says where ours spends its time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop
from gateway_cpu import STEP_S, Child

from crossdock.deploy.home import crossdock_home
from crossdock.model.export import export_model
from crossdock.model.store import resolve
from crossdock.proto.types import Role, WorkerEndpoint

TICKS = os.sysconf("SC_CLK_TCK")  # in a second
PREFILL_MS = 2.0  # as gateway_cpu's prefill worker
CHECK_S = 60.0  # for one answer before anything is measured
TEXT = (
    "the of and to in is that for it as was with be by on not he this are or his from at which "
    "but have an had they you were their one all we can her has there been if more when will "
    "would who so no out up into than them only some could time these two may then do first any "
    "my now such like our over man me even most made after also did many before must through "
    "years where much your way well down should because each just those people how too little "
    "state good very make world still own see men work long get here between both life being "
    "under never day same another know while last might us great old year off come since against "
    "go came right used take three states himself few house use during without again place "
    "American around however home small found Mrs thought went say part once general high upon "
    "school every don't does got united left number course war until always away something fact "
    "water though less public put thing almost hand enough far took head yet government system "
    "better set told nothing night end"
)
WORDS = TEXT.split()


# -- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stat:
    """One process: who started it, and the CPU seconds that it and its children that ended took."""

    pid: int
    parent: int
    cpu_s: float


def parse_stat(text: str) -> Stat:
    """Of /proc/PID/stat; the name in it may hold spaces and parentheses."""
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return Stat(int(head.partition(" ")[0]), int(fields[1]), ticks / TICKS)


def cpu_s_of(stats: Iterable[Stat], roots: Iterable[int]) -> float:
    """CPU seconds of these processes and all that descend from them. Raises ProcessLookupError."""
    by_pid, counted = {stat.pid: stat for stat in stats}, set(roots)
    if missing := counted - by_pid.keys():
        raise ProcessLookupError(f"process {min(missing)} is not there")
    while more := {s.pid for s in by_pid.values() if s.parent in counted} - counted:
        counted |= more
    return sum(by_pid[pid].cpu_s for pid in counted)


def running() -> Iterator[Stat]:
    """All processes of the machine."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield parse_stat(path.read_text())


class Instructions:
    """User-mode instructions of processes, counted by perf between entering and leaving."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.count = 0
        pid_list = ",".join(map(str, pids))
        self._command = ["perf", "stat", "-x,", "-e", "instructions:u", "-p", pid_list]

    def __enter__(self) -> Instructions:
        self._perf = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        time.sleep(0.3)  # until it is attached to every thread
        return self

    def __exit__(self, *_: object) -> None:
        self._perf.send_signal(signal.SIGINT)
        self.count = parse_perf(self._perf.communicate()[1])

    @staticmethod
    def available() -> bool:
        """Whether perf is installed and the machine has the counter."""
        with contextlib.suppress(OSError, ValueError):
            with Instructions([os.getpid()]):
                pass
            return True
        return False


def parse_perf(text: str) -> int:
    """The count in what `perf stat -x, -e instructions:u` writes. Raises ValueError where there is
    none, as where the machine has no such counter."""
    for line in text.splitlines():
        count, _, event, *_ = [*line.split(","), "", ""]
        if event.startswith("instructions"):
            return int(count)
    raise ValueError(f"perf counted no instructions: {text.strip()}")


# -- load ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """A front end that is measured."""

    name: str
    url: str
    pids: tuple[int, ...]

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def cpu_s(self) -> float:
        """CPU seconds of its processes until now."""
        return cpu_s_of(running(), self.pids)


@dataclass(frozen=True)
class Load:
    """What is sent: `words` in a text, `tokens` in an answer."""

    model: str
    requests: int
    concurrency: int
    tokens: int
    words: int

    def body(self, number: int, stream: bool = True) -> dict[str, Any]:
        """The number-th request; no two are alike."""
        words = " ".join(random.Random(f"text {number}").choices(WORDS, k=self.words))
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self.tokens,
            "stream": stream,
            "ignore_eos": True,
            "temperature": 0,
        }

    def packed(self, number: int) -> bytes:
        """The same as HTTP sends it."""
        body = json.dumps(self.body(number)).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )


class Connection(asyncio.Protocol):
    """One after another, requests over a connection that is kept; counts the events of answers."""

    def __init__(self) -> None:
        self.events = 0
        self._tail = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is of no class of asyncio's

    async def ask(self, request: bytes) -> None:
        """Returns at the end of the answer. Raises ConnectionError for any but a whole stream."""
        self._done, self._tail = asyncio.get_running_loop().create_future(), b""
        self.transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(f"it answered {data[:400]!r}")
            return
        self.events += (self._tail[-5:] + data).count(b"data: ")
        self._tail = (self._tail + data)[-40:]
        if self._tail.endswith(b"0\r\n\r\n"):
            if b"[DONE]" not in self._tail:
                self._fail(f"its stream ended with {self._tail!r}")
            elif self._done and not self._done.done():
                self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection was closed: {error}")

    def _fail(self, why: str) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError(why))


async def send(front: Front, load: Load, first: int) -> int:
    """Sends the load's requests from the first-th on, and returns the events that came."""
    host, port = front.address
    loop = asyncio.get_running_loop()
    left = iter(range(first, first + load.requests))
    connections: list[Connection] = []

    async def stream() -> None:
        _, connection = await loop.create_connection(Connection, host, port)
        connections.append(connection)
        for number in left:
            await connection.ask(load.packed(number))

    try:
        async with asyncio.TaskGroup() as streams:
            for _ in range(min(load.concurrency, load.requests)):
                streams.create_task(stream())
    finally:
        for connection in connections:
            connection.transport.close()
    return sum(connection.events for connection in connections)


def check(front: Front, load: Load) -> int:
    """One answer, which must be as long as was asked for. Returns its prompt's tokens."""
    data = json.dumps(load.body(-1, stream=False)).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{front.url}/v1/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=CHECK_S) as answer:
        usage = json.load(answer)["usage"]
    if usage["completion_tokens"] != load.tokens:
        raise ValueError(f"{front.name}: {usage['completion_tokens']} tokens, not {load.tokens}")
    return int(usage["prompt_tokens"])


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One front end's figures, of a request but for wall_s, which is the round's."""

    cpu_ms: float
    events: float
    wall_s: float
    instructions: float | None = None  # millions, in user mode


def measure(front: Front, load: Load, first: int, counting: bool) -> Round:
    """One round."""
    counter = Instructions(front.pids) if counting else None
    with counter or contextlib.nullcontext():
        before, began = front.cpu_s(), time.monotonic()
        events = uvloop.run(send(front, load, first))
        cpu, wall = front.cpu_s() - before, time.monotonic() - began
    count = load.requests
    instructions = counter.count / count / 1e6 if counter else None
    return Round(1000 * cpu / count, events / count, wall, instructions)


def compared(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, float]:
    """Ours over theirs, by round and by the medians."""
    ratios = [a.cpu_ms / b.cpu_ms for a, b in zip(ours, theirs, strict=True)]
    medians = [statistics.median(each.cpu_ms for each in rounds) for rounds in (ours, theirs)]
    found = {
        "ratio_of_medians": medians[0] / medians[1],
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
    }
    counts = [[r.instructions for r in rounds if r.instructions] for rounds in (ours, theirs)]
    if all(counts):
        mine, other = map(statistics.median, counts)
        found["ratio_of_instructions"] = mine / other
    return found


def machine() -> dict[str, Any]:
    """What it is, and how busy."""
    found = Path("/proc/cpuinfo").read_text().partition("model name")[2]
    name = found.partition("\n")[0].strip("\t: ")
    load = [round(each, 2) for each in os.getloadavg()]
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.release(), "load": load}


@contextlib.contextmanager
def ours(model: str, home: Path, profile: str) -> Iterator[Front]:
    """Our gateway before two simulated workers, with the model's own tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CROSSDOCK_HOME"] = scratch
        roles = ("prefill", "decode")
        workers = [Child("worker", f"{role}-0", role, model, str(home)) for role in roles]
        described = [child.pipe.recv() for child in workers]
        members = [WorkerEndpoint(**(each | {"role": Role(each["role"])})) for each in described]
        gateway = Child("gateway", profile, model, str(home))
        try:
            _, http = gateway.pipe.recv()
            for child in (*workers, gateway):
                child.ask(members)
            yield Front("crossdock", f"http://{http}", (gateway.pid,))
        finally:
            for child in (gateway, *workers):
                child.end()


def write_peer_model(model: str, home: Path, folder: Path) -> None:
    """The model as other servers read it, and the pace of simulated workers as Dynamo's mockers
    read it: what our workers take, at any length."""
    export_model(model, folder, home, force=True)
    ends = np.array([1.0, 1e9])  # of every grid: between them the pace is the same
    np.savez(
        folder / "pace.npz",
        prefill_isl=ends,
        prefill_ttft_ms=np.full(2, PREFILL_MS),
        decode_active_kv_tokens=ends,
        decode_context_length=ends,
        decode_itl=np.full((2, 2), 1000 * STEP_S),
    )


def report(
    fronts: Sequence[Front], load: Load, rounds: int, counting: bool
) -> dict[str, Sequence[Round]]:
    """Measures them in turn, and prints each figure as it comes."""
    found: dict[str, list[Round]] = {front.name: [] for front in fronts}
    for front in fronts:
        pids = ", ".join(map(str, front.pids))
        print(f"{front.name}: process {pids}, a text of {check(front, load)} tokens", flush=True)
        uvloop.run(send(front, load, -load.requests - 1))
    for number in range(rounds):
        for front in fronts:
            each = measure(front, load, number * load.requests, counting)
            found[front.name].append(each)
            counted = f", {each.instructions:.2f} M instructions" if each.instructions else ""
            print(
                f"{front.name}: {each.cpu_ms:.2f} ms of CPU a request{counted}, {each.events:.1f} "
                f"events ({load.requests} in {each.wall_s:.1f} s)",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-url", help="of a front end that runs, as http://127.0.0.1:8300")
    parser.add_argument("--peer-pid", type=int, nargs="+", help="of its processes")
    parser.add_argument("--peer-name", default="peer")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a known model, or a file")
    parser.add_argument("--requests", type=int, default=1024, help="of a round")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--profile", default="", help="where to write cProfile's statistics of ours"
    )
    parser.add_argument("--write-peer-model", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if bool(options.peer_url) != bool(options.peer_pid):
        parser.error("--peer-url and --peer-pid go together")
    home = crossdock_home()
    if options.write_peer_model:
        write_peer_model(options.model, home, options.write_peer_model)
        return
    sizes = options.requests, options.concurrency, options.tokens, options.words
    load = Load(resolve(options.model, home).model_id, *sizes)
    counting = Instructions.available()
    with ours(options.model, home, options.profile) as front:
        fronts = [front]
        if options.peer_url:
            url = options.peer_url.rstrip("/")
            fronts.append(Front(options.peer_name, url, tuple(options.peer_pid)))
        found = report(fronts, load, options.rounds, counting)
    result: Mapping[str, Any] = {
        "machine": machine(),
        "load": asdict(load) | {"step_ms": 1000 * STEP_S},
        "rounds": {name: [asdict(each) for each in rounds] for name, rounds in found.items()},
    }
    if len(fronts) > 1:
        result = {**result, **compared(*found.values())}
        print(json.dumps({k: round(v, 3) for k, v in result.items() if isinstance(v, float)}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
