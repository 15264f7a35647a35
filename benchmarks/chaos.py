"""Kills and freezes workers and sends clients away while requests run, and checks every token.

Each request is asked once before the faults begin; whatever happens later, it must be answered
with the same tokens. The cluster is one of two prefill and two decode workers with the default
model, started and ended here; or one that runs on this machine already, which then must have been
started as benchmarks/chaos_wire.py says, with CROSSDOCK_CHAOS naming an empty folder.

    python benchmarks/chaos.py --seed 1
    python benchmarks/chaos.py --rounds 8        # 8 times as many faults
    python benchmarks/chaos.py --rounds 0.5 --engine vllm --model FOLDER --ranks 2
    python benchmarks/chaos.py --target 127.0.0.1:50051 --admin 127.0.0.1:50050 --wire /tmp/wire
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import Faults, plan
from chaos_journal import Journal
from chaos_report import MIN_REQUESTS, Asked, End, Outcome, Undisturbed
from clusters import DEFAULT_MODEL, running, spec

from crossdock.client import AsyncClient
from crossdock.deploy import admin
from crossdock.proto.errors import CrossdockError, Overloaded, Unavailable

HERE = Path(__file__).resolve().parent
# A small pool: touching its pages is a quarter of a worker's start, and workers start often here.
POOLS = """\
  prefill: {{role: prefill, replicas: 2, kv_memory_mb: 192, resources: {{cpus: 1}}, {engine}}}
  decode:  {{role: decode,  replicas: 2, kv_memory_mb: 192, resources: {{cpus: 1}}, {engine}}}
"""
ENGINES = {
    "simulated": "engine: {kind: simulated, profile: {prefill_token_s: 2.0e-4, decode_s: 15.0e-3}}",
    "vllm": "engine: {kind: vllm, args: {tensor_parallel_size: RANKS}}",
}
MORE = {"vllm": "kv: {block_size: 32}\n"}  # the least that vLLM's attention takes on a CPU
# Few candidates for the sampled ones: prompts computed in other chunks differ in the last bits, and
# among thousands of almost equally likely tokens that would choose another now and then.
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 7, "top_k": 4},
)
TEXT = """the a ship left harbour with grain and timber while rain fell over old quays where men
counted crates by lamp light before morning came and every cart had gone up to town again so that
nobody knew which of them carried salt or wine or letters from far islands"""


@dataclass(frozen=True)
class Case:
    """One request that is asked again and again."""

    prompt: str
    max_tokens: int
    sampling: dict[str, Any]


def cases(rng: random.Random, count: int = 25) -> list[Case]:
    """A fifth of the prompts is long enough to be computed in several chunks."""
    made, vocabulary = [], TEXT.split()
    for index in range(count):
        words = rng.randrange(260, 700) if index % 5 == 4 else rng.randrange(5, 80)
        prompt = " ".join(rng.choice(vocabulary) for _ in range(words)).capitalize() + "."
        tokens = rng.choice((8, 12, 16, 24, 40))
        made.append(Case(prompt, tokens, SAMPLING[index % len(SAMPLING)]))
    return made


@dataclass
class Load:
    """Clients that ask one request after another, each waiting for its answer."""

    client: AsyncClient
    cases: list[Case]
    rng: random.Random
    hang_s: float
    think_s: float  # of a client between two requests, on average
    asked: list[Asked] = field(default_factory=list)
    stopping: bool = False
    _streams: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _aborted: set[str] = field(default_factory=set)

    async def undisturbed(self) -> list[Undisturbed]:
        async def one(case: Case) -> Undisturbed:
            result = await self.client.generate(
                case.prompt,
                max_tokens=case.max_tokens,
                ignore_eos=True,
                logprobs=2,
                timeout=self.hang_s,
                **case.sampling,
            )
            return Undisturbed(result.token_ids, tuple(each.top for each in result.logprobs))

        return [await one(case) for case in self.cases]

    def abort(self, request: str) -> bool:
        """Has a client go away; False when its request has ended."""
        stream = self._streams.get(request)
        if stream is None or stream.done():
            return False
        self._aborted.add(request)
        stream.cancel()
        return True

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self._ask_on() for _ in range(clients)))

    async def _ask_on(self) -> None:
        while not self.stopping:
            seen = Asked(
                f"chaos-{len(self.asked)}", self.rng.randrange(len(self.cases)), time.monotonic()
            )
            self.asked.append(seen)
            stream = asyncio.create_task(self._stream(seen))
            self._streams[seen.request] = stream
            await asyncio.wait([stream])
            del self._streams[seen.request]
            if not stream.cancelled() and (error := stream.exception()):
                seen.end, seen.error = End.FAILED, f"{type(error).__name__}: {error}"
            seen.ended_at = time.monotonic()
            await asyncio.sleep(self.rng.uniform(0.0, 2 * self.think_s))

    async def _stream(self, seen: Asked) -> None:
        case = self.cases[seen.case]
        # Half of them may find their prompt in a cache; the others compute all of it.
        salt = seen.request if self.rng.random() < 0.5 else ""
        chunks = self.client.stream(
            case.prompt,
            request_id=seen.request,
            max_tokens=case.max_tokens,
            ignore_eos=True,
            cache_salt=salt,
            **case.sampling,
        )
        try:
            while True:
                async with asyncio.timeout(self.hang_s):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                seen.token_ids += chunk.token_ids
                seen.token_times += [time.monotonic()] * len(chunk.token_ids)
            seen.end = End.FINISHED
        except TimeoutError:
            seen.end, seen.error = End.HUNG, f"no token for {self.hang_s:g} s"
        except (Unavailable, Overloaded) as error:
            seen.end, seen.error = End.REFUSED, str(error)
        except CrossdockError as error:
            seen.end, seen.error = End.FAILED, f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            if seen.request not in self._aborted:
                raise
            seen.end = End.ABORTED
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]


async def chaos(options: argparse.Namespace, wire: Path, target: str, address: str) -> Outcome:
    """Load and faults until all faults have struck and enough was asked; then all falls quiet."""
    rng, journal = random.Random(options.seed), Journal(wire / "journal")
    async with AsyncClient(target) as client:
        load = Load(
            client, cases(rng), random.Random(options.seed), options.hang_s, options.think_s
        )
        undisturbed = await load.undisturbed()
        faults = Faults(wire, journal, random.Random(options.seed), load.abort)
        began = time.monotonic()
        running_load = asyncio.create_task(load.run(options.clients))
        await faults.run(plan(rng, options.rounds), began + options.limit_s)
        while len(load.asked) < options.requests and time.monotonic() < began + options.limit_s:
            await asyncio.sleep(0.1)
        load.stopping = True
        await running_load
        seconds = time.monotonic() - began
        settled_s, unsettled = await settle(address, options.hang_s)
    journal.refresh()
    return Outcome(
        asked=load.asked,
        undisturbed=undisturbed,
        struck=faults.struck,
        missed=faults.missed,
        journal=journal,
        rounds=options.rounds,
        seconds=seconds,
        settled_s=settled_s,
        unsettled=unsettled,
    )


async def settle(address: str, limit_s: float) -> tuple[float, list[str]]:
    """Seconds until nothing is held anywhere, from when the last worker was there again; and what
    was still wrong after `limit_s`."""
    whole_at = math.inf
    end = time.monotonic() + limit_s
    while True:
        try:
            status = await asyncio.to_thread(admin.status, address, check_integrity=True)
        except CrossdockError as error:
            return math.inf, [f"the controller: {error}"]
        now = time.monotonic()
        if status.converged:
            whole_at = min(whole_at, now)
        problems = [] if status.converged else ["the cluster is not whole again"]
        problems += [p for member in status.workers for p in held_by(member)]
        problems += [
            f"{gateway.name}: {gateway.active_requests} requests"
            for gateway in status.gateways
            if gateway.active_requests
        ]
        if not problems or now > end:
            return (max(0.0, now - whole_at) if not problems else math.inf), problems
        await asyncio.sleep(0.2)


def held_by(member: Any) -> list[str]:
    """What a worker still holds, or has lost count of."""
    worker = member.worker
    held = {"leases": len(worker.leases), "used blocks": worker.used_blocks}
    found = [f"{member.name}: {count} {what}" for what, count in held.items() if count]
    if not worker.description.name:
        found.append(f"{member.name}: does not answer")
    if worker.integrity_error:
        found.append(f"{member.name}: {worker.integrity_error}")
    return found


@contextlib.contextmanager
def own_cluster(options: argparse.Namespace, more: str = "") -> Iterator[tuple[Path, str, str]]:
    """(the wire's folder, the gateway's address, the controller's) of a cluster for this run, with
    `more` at the end of its YAML."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {
            "PYTHONPATH": os.pathsep.join(path),
            "CROSSDOCK_EVENT_LISTENER": "chaos_wire:reached",
            "CROSSDOCK_CHAOS": folder,
        }
        kind = "simulated" if options.model == "simulated" else options.engine
        engine = ENGINES.get(kind, f"engine: {{kind: {kind}}}").replace("RANKS", str(options.ranks))
        pools = POOLS.format(engine=engine)
        yaml = spec(f"chaos-{os.getpid()}", pools + MORE.get(kind, "") + more, options.model)
        with running(yaml, verbose=options.verbose, env=env) as cluster:
            yield Path(folder), cluster.grpc, cluster.admin


def run(options: argparse.Namespace) -> Outcome:
    if options.target:
        return asyncio.run(chaos(options, Path(options.wire), options.target, options.admin))
    with own_cluster(options) as where:
        return asyncio.run(chaos(options, *where))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--rounds", type=float, default=1, help="of 114 faults each")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--clients", type=int, default=8, help="requests under way at once")
    made.add_argument("--requests", type=int, default=MIN_REQUESTS, help="at least")
    made.add_argument("--think-s", type=float, default=1.5, help="between two of a client's")
    made.add_argument("--limit-s", type=float, default=0.0, help="default: 1200 s a round")
    made.add_argument("--hang-s", type=float, default=60.0, help="without a token: it hangs")
    made.add_argument("--model", default=DEFAULT_MODEL, help="`simulated`: the engine too")
    made.add_argument("--engine", default="native", choices=("native", "vllm"), help="with a model")
    made.add_argument(
        "--ranks", type=int, default=1, help="of a vllm engine, by tensor parallelism"
    )
    made.add_argument("--target", default="", help="the gateway of a cluster that runs")
    made.add_argument("--admin", default="127.0.0.1:50050", help="and its controller")
    made.add_argument("--wire", default="", help="and its CROSSDOCK_CHAOS")
    made.add_argument("--verbose", action="store_true", help="shows what the cluster says")
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    options.limit_s = options.limit_s or 1200.0 * max(1.0, options.rounds)
    return options


def main() -> int:
    outcome = run(parse(sys.argv[1:]))
    for line in outcome.lines():
        print(line)
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    failed = [*outcome.failures(), *outcome.slow()]
    for line in failed[:30]:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
