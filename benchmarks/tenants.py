"""What a tenant at ten times its rate does to another: TTFT of the other, in one run.

On a virtual clock, so that the figures are of the gateway's decisions and not of the machine: the
real limits, turns, room, policy and view of a gateway before a simulated prefill and a decode
worker (routing_cluster.py). One tenant asks steadily. Beside it another asks at its rate, then at
ten times that under a limit at its rate, then at ten times that with no limit, where turns are all
that stands between the two, and last without turns.

    python benchmarks/tenants.py --seconds 600 --json result.json

A phase is told as it ends; all four of 600 s, 178,000 requests, take some two to four minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from routing_cluster import BLOCK, Cluster, Prompt, Speed, chain

from crossdock.bench.run import describe_machine
from crossdock.proto.errors import RateLimited
from crossdock.proto.steps import Yields
from crossdock.router.config import KeyLimits
from crossdock.router.dispatch.turns import Turns
from crossdock.router.frontdoor.limits import Limiter
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.placement.room import has_room

PROMPT_TOKENS, TOKENS = 200, 32
SPEED = Speed(base=0.002, per_token=0.00005, chunk_tokens=512, step_base=0.01)  # 12 ms a prompt
STEADY, RATE, FLOOD = 12.0, 8.0, 10.0  # requests a second; how many times the other's rate
WARM_S = 5.0  # that are not counted


@dataclass
class Phase:
    """What the other tenant does."""

    name: str
    rate: float
    limited: bool = False
    turns: bool = True


PHASES = (
    Phase("at its rate", RATE),
    Phase("ten times, limited", FLOOD * RATE, limited=True),
    Phase("ten times, unlimited", FLOOD * RATE),
    Phase("ten times, no turns", FLOOD * RATE, turns=False),
)


class Gateway(Cluster):
    """A cluster whose prompts wait for their tenants' turns."""

    def __init__(self, turns: bool) -> None:

        def room(yields: Yields) -> bool:
            return not turns or has_room(self.view, self.clock.now, yields)

        self.turns = Turns(room, self._begin)
        super().__init__(SPEED, prefills=1, decodes=1)
        self._order = 0

    def ask(self, tenant: str, prompt: Prompt) -> None:
        """A request comes in."""
        self._order += 1
        request = SimpleNamespace(tenant=tenant, priority=0, deadline=None)
        waiting: Any = Waiting(
            active=SimpleNamespace(request=request, order=self._order),
            index=0,
            prompt_tokens=prompt.tokens,
            sampling=SimpleNamespace(max_tokens=prompt.output),
            generated=0,
            holders=(),
            yields=Yields.NOT,
            prompt=prompt,
        )
        self.turns.add(waiting)
        self.turns.pump()

    def take(self, name: str, load: Any, events: Any) -> None:
        """As a Cluster; a load report is when turns go on."""
        super().take(name, load, events)
        self.turns.pump()

    def first_token(self, prompt: Prompt, key: str) -> float:
        """As a Cluster; the worker goes on with the next prompt."""
        self.view.computed(prompt.prefill, key, self.clock.now)
        self.turns.pump()
        return super().first_token(prompt, key)

    def _begin(self, waiting: Any) -> None:
        self.arrive(waiting.prompt)


class Waiting(SimpleNamespace):
    """What Turns knows of a sequence."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def run(phase: Phase, seconds: float, seed: int) -> dict[str, Any]:
    """TTFT of the steady tenant, and what the other was given."""
    gateway = Gateway(phase.turns)
    clock = gateway.clock
    limiter = Limiter(lambda: clock.now, lambda: clock.now)
    limits = KeyLimits(requests_per_minute=int(60 * RATE) if phase.limited else 0)
    other = Principal("other", "k", limits=limits, account="key k")
    asked: dict[str, list[Prompt]] = {"steady": [], "other": []}
    refused = 0

    def arrive(tenant: str) -> None:
        nonlocal refused
        if tenant == "other":
            try:
                limiter.count_request(other)
            except RateLimited:
                refused += 1
                return
        hashes = chain(gateway.rng, PROMPT_TOKENS // BLOCK * BLOCK)
        prompt = Prompt(PROMPT_TOKENS, hashes, clock.now, output=TOKENS)
        asked[tenant].append(prompt)
        gateway.ask(tenant, prompt)

    for tenant, rate, salt in (("steady", STEADY, 1), ("other", phase.rate, 2)):
        rng, at = random.Random(seed * 10 + salt), 0.0
        while (at := at + rng.expovariate(rate)) < seconds:
            clock.after(at, lambda tenant=tenant: arrive(tenant))  # type: ignore[misc]
    clock.run(seconds + 30)
    counted = [p.ttft for p in asked["steady"] if p.arrived > WARM_S and p.ttft is not None]
    theirs = [p.ttft for p in asked["other"] if p.ttft is not None]
    return {
        "p50_ms": round(1000 * percentile(counted, 0.5), 1),
        "p99_ms": round(1000 * percentile(counted, 0.99), 1),
        "requests": len(counted),
        "other": {"served": len(theirs), "refused": refused},
        "other_p50_ms": round(1000 * percentile(theirs, 0.5), 1),
    }


def percentile(values: Sequence[float], part: float) -> float:
    """Of the values in order."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def measure(
    seconds: float, seed: int = 1, tell: Callable[[str, dict[str, Any]], None] = lambda *_: None
) -> dict[str, Any]:
    """All phases, each with the ratio of its p99 to the first one's; each is told as it ends."""
    found: dict[str, Any] = {}
    for phase in PHASES:
        each = run(phase, seconds, seed)
        base = found[PHASES[0].name]["p99_ms"] if found else each["p99_ms"]
        found[phase.name] = each | {"ratio": round(each["p99_ms"] / base, 3)}
        tell(phase.name, found[phase.name])
    return found


def main() -> None:
    """Runs the benchmark and prints its figures."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of each phase, virtual")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    began = time.monotonic()
    requests = options.seconds * sum(STEADY + phase.rate for phase in PHASES)
    print(f"{len(PHASES)} phases of {options.seconds:g} s, {requests:.0f} requests", flush=True)

    def tell(name: str, each: dict[str, Any]) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {name:22} p50 {each['p50_ms']:8.1f} ms  "
              f"p99 {each['p99_ms']:8.1f} ms  ratio {each['ratio']:6.2f}  other: {each['other']}",
              flush=True)  # fmt: skip

    found = measure(options.seconds, options.seed, tell)
    if options.json:
        report = {"machine": describe_machine(), "phases": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
