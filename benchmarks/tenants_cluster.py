"""What a tenant at ten times its rate does to another, on the wall clock: TTFT of the other.

A local cluster with a simulated engine, real gateway, keys and sockets. One tenant asks steadily;
beside it another asks at its rate and at ten times that, in turn and several times over, so that
what else the machine does falls on both alike: first under a limit at its rate, then without one,
where turns are all that stands between the two. benchmarks/tenants.py does the same on a virtual
clock, without the machine.

    python benchmarks/tenants_cluster.py --rounds 4 --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from clusters import running, spec

from crossdock.client import AsyncClient
from crossdock.proto.errors import CrossdockError
from crossdock.router.frontdoor.keys import add_key

PROMPT_TOKENS, TOKENS = 200, 32
POOLS = """\
  prefill: {{role: prefill, replicas: 1, kv_memory_mb: 64, chunk_tokens: 512, {engine}}}
  decode:  {{role: decode,  replicas: 1, kv_memory_mb: 64, {engine}}}
auth: {{keys: {keys}}}
"""
ENGINE = """\
engine: {kind: simulated, profile: {
    kv_bytes_per_token: 256, prefill_s: 0.01, prefill_token_s: 2.0e-4, decode_s: 0.02}}"""
STEADY, RATE, FLOOD = 6.0, 4.0, 10.0  # requests a second; how many times the other's rate
WARM_S = 2.0  # of each phase, not counted


@dataclass
class Phase:
    """What the other tenant does, and what the steady one saw, in seconds."""

    name: str
    rate: float
    key: str
    ttft: list[float] = field(default_factory=list)
    served: int = 0
    refused: int = 0

    def percentile(self, part: float) -> float:
        """Of the steady tenant's TTFT, in ms."""
        return 1000 * sorted(self.ttft)[min(len(self.ttft) - 1, int(part * len(self.ttft)))]


class Load:
    """Both tenants' requests in one phase, arrivals of a Poisson process each."""

    def __init__(self, target: str, steady_key: str, phase: Phase, seconds: float) -> None:
        self._target, self._steady_key = target, steady_key
        self._phase, self._seconds = phase, seconds

    async def run(self, rng: random.Random) -> None:
        """Until all that was asked has ended."""
        async with (
            AsyncClient(self._target, self._steady_key) as steady,
            AsyncClient(self._target, self._phase.key) as other,
        ):
            await asyncio.gather(
                self._arrivals(steady, STEADY, random.Random(rng.random()), True),
                self._arrivals(other, self._phase.rate, random.Random(rng.random()), False),
            )

    async def _arrivals(
        self, client: AsyncClient, rate: float, rng: random.Random, steady: bool
    ) -> None:
        began = at = time.monotonic()
        asked = []
        while (at := at + rng.expovariate(rate)) < began + self._seconds:
            await asyncio.sleep(at - time.monotonic())
            counted = steady and at > began + WARM_S
            prompt = [rng.randrange(3, 250) for _ in range(PROMPT_TOKENS)]
            asked.append(asyncio.create_task(self._ask(client, prompt, steady, counted)))
        await asyncio.gather(*asked)

    async def _ask(
        self, client: AsyncClient, prompt: list[int], steady: bool, counted: bool
    ) -> None:
        began = time.monotonic()
        stream = client.stream(prompt, max_tokens=TOKENS, ignore_eos=True)
        try:
            async for _ in stream:
                if counted:
                    self._phase.ttft.append(time.monotonic() - began)
                    counted = False
            self._phase.served += not steady
        except CrossdockError:
            if steady:
                raise
            self._phase.refused += 1


def main() -> None:
    """Runs the phases and prints the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a phase in a round")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.yaml"
        steady = add_key(file, {"tenant": "steady"})
        # Of a minute and not of a second: the allowance must not be used up in a phase's beginning.
        limits = {"requests_per_minute": int(60 * RATE)}
        limited = add_key(file, {"tenant": "other", "limits": limits})
        free = add_key(file, {"tenant": "another"})
        phases = [
            Phase("limited, at its rate", RATE, limited),
            Phase("limited, ten times", FLOOD * RATE, limited),
            Phase("no limit, at its rate", RATE, free),
            Phase("no limit, ten times", FLOOD * RATE, free),
        ]
        yaml = spec(f"tenants-{os.getpid()}", POOLS.format(engine=ENGINE, keys=file), "simulated")
        with running(yaml) as cluster:
            for _ in range(options.rounds):
                for phase in phases:
                    asyncio.run(Load(cluster.grpc, steady, phase, options.seconds).run(rng))
    for base, flood in (phases[:2], phases[2:]):
        for each in (base, flood):
            ratios = [each.percentile(p) / base.percentile(p) for p in (0.5, 0.99)]
            print(
                f"{each.name:22} p50 {each.percentile(0.5):7.1f} ms  "
                f"p99 {each.percentile(0.99):7.1f} ms  ratio {ratios[0]:5.2f} {ratios[1]:5.2f}  "
                f"({len(each.ttft)} counted; the other: {each.served} served, "
                f"{each.refused} refused)"
            )
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
