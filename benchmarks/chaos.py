"""Kills and freezes the workers of a running cluster while requests run, and checks every token.

Each request is asked once before the faults begin; whatever happens later, it must be answered
with the same tokens. Use a cluster that can be hurt, on this machine, with two workers of each
role, so that work can go on elsewhere.

    crossdock up two-of-each.yaml
    python benchmarks/chaos.py --seconds 120 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from crossdock.client import AsyncClient
from crossdock.deploy import admin
from crossdock.proto.errors import CrossdockError

# Few candidates for the sampled ones: prompts computed in other chunks differ in the last bits, and
# among thousands of almost equally likely tokens that would choose another now and then.
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 7, "top_k": 4},
)


@dataclass
class Outcome:
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    longest_gaps_s: list[float] = field(default_factory=list)
    faults: int = 0


async def ask(client: AsyncClient, prompt: list[int], number: int, tokens: int) -> Any:
    """(token ids, the longest wait for a chunk in seconds)"""
    ids: list[int] = []
    gap, last = 0.0, time.monotonic()
    sampling = SAMPLING[number % len(SAMPLING)]
    stream = client.stream(prompt, max_tokens=tokens, ignore_eos=True, timeout=120, **sampling)
    async for chunk in stream:
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        ids += chunk.token_ids
    return ids, gap


async def load(
    client: AsyncClient,
    asked: list[list[int]],
    expected: list[list[int]],
    first: int,
    options: argparse.Namespace,
    outcome: Outcome,
    stop: asyncio.Event,
) -> None:
    number = first
    while not stop.is_set():
        index, number = number % len(asked), number + options.concurrency
        try:
            ids, gap = await ask(client, asked[index], index, options.output_len)
        except CrossdockError as error:
            outcome.errors.append(f"{type(error).__name__}: {error}")
            continue
        outcome.answered += 1
        outcome.longest_gaps_s.append(gap)
        if ids != expected[index]:
            pairs = enumerate(zip(ids, expected[index]))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(expected[index])))
            outcome.wrong.append(f"request {index}: {len(ids)} tokens, the first wrong at {at}")


async def hurt(options: argparse.Namespace, rng: random.Random, outcome: Outcome) -> None:
    """SIGKILL, or SIGSTOP and SIGCONT, to one ready worker after another until time is up."""
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        await asyncio.sleep(rng.uniform(2, 6))
        status = await asyncio.to_thread(admin.status, options.admin)
        ready = [worker for worker in status.workers if worker.state == "ready"]
        if len(ready) < 3:
            continue
        victim = rng.choice(ready)
        with contextlib.suppress(ProcessLookupError):
            if rng.random() < 0.7:
                os.kill(victim.pid, signal.SIGKILL)
            else:
                os.kill(victim.pid, signal.SIGSTOP)
                await asyncio.sleep(rng.uniform(0.5, 4))
                os.kill(victim.pid, signal.SIGCONT)
            outcome.faults += 1


async def run(options: argparse.Namespace) -> Outcome:
    rng, outcome, stop = random.Random(options.seed), Outcome(), asyncio.Event()
    low, high = 3, options.vocabulary
    asked = [[rng.randrange(low, high) for _ in range(rng.randrange(5, 300))] for _ in range(24)]
    async with AsyncClient(options.target) as client:
        expected = [(await ask(client, p, i, options.output_len))[0] for i, p in enumerate(asked)]
        loops = [
            asyncio.create_task(load(client, asked, expected, i, options, outcome, stop))
            for i in range(options.concurrency)
        ]
        await hurt(options, rng, outcome)
        stop.set()
        _, hung = await asyncio.wait(loops, timeout=150)
        outcome.errors += ["a request hangs"] * len(hung)
    return outcome


async def settled(address: str) -> list[str]:
    """What is wrong once the cluster has had 20 s to come to rest."""
    problems = ["not asked"]
    for _ in range(40):
        await asyncio.sleep(0.5)
        status = await asyncio.to_thread(admin.status, address, check_integrity=True)
        problems = [] if status.converged else ["the cluster is not whole again"]
        for member in status.workers:
            worker = member.worker
            held = {"leases": len(worker.leases), "used blocks": worker.used_blocks}
            found = [f"{count} {what}" for what, count in held.items() if count]
            found += [worker.integrity_error] if worker.integrity_error else []
            problems += [f"{member.name}: {what}" for what in found]
        if not problems:
            break
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", default="127.0.0.1:50051", help="the gateway")
    parser.add_argument("--admin", default="127.0.0.1:50050", help="the controller")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = asyncio.run(run(options))
    problems = asyncio.run(settled(options.admin))
    gaps = sorted(outcome.longest_gaps_s) or [0.0]
    print(
        f"faults {outcome.faults}, answered {outcome.answered}, wrong {len(outcome.wrong)}, "
        f"errors {len(outcome.errors)}, longest gap p50 {gaps[len(gaps) // 2]:.2f} s, "
        f"max {gaps[-1]:.2f} s"
    )
    for line in [*outcome.wrong, *outcome.errors, *problems][:20]:
        print(f"  {line}")
    return 1 if outcome.wrong or outcome.errors or problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
