"""Whom early refusal turns away on a real cluster of simulated engines, asked for more than it can
compute: requests with a deadline, and of those that are refused a share that is asked again at
once without one. It was refused wrongly if its first token then comes before the deadline.

    python benchmarks/deadlines_cluster.py --seconds 60 --load 1.5
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections import Counter

from clusters import running, spec

from crossdock.client import AsyncClient
from crossdock.proto.errors import DeadlineExceeded, Overloaded

PROMPTS, TOKENS = (100, 900), 4  # prompt tokens, uniform
DEADLINE_S = 2.0
PROMPT_S = 0.01 + 500 * 4.0e-4  # of the mean prompt
POOLS = """\
  prefill: {role: prefill, replicas: 2, kv_memory_mb: 64, chunk_tokens: 512, ENGINE}
  decode:  {role: decode,  replicas: 1, kv_memory_mb: 64, ENGINE}
slo: {ttft_ms: 2000, tpot_ms: 200}
""".replace(
    "ENGINE",
    """resources: {cpus: 0.05}, engine: {kind: simulated, profile: {
    kv_bytes_per_token: 256, prefill_s: 0.01, prefill_token_s: 4.0e-4, decode_s: 0.02}}""",
)


class Trial:
    """What became of the requests."""

    def __init__(self, client: AsyncClient, rng: random.Random, again: float) -> None:
        self._client, self._rng, self._again = client, rng, again
        self.found: Counter[str] = Counter()
        self.refused_after: list[float] = []

    async def run(self, rate: float, seconds: float) -> None:
        """Poisson arrivals for so long."""
        began, asked, at = time.monotonic(), [], 0.0
        while (at := at + self._rng.expovariate(rate)) < seconds:
            prompt = [self._rng.randrange(3, 250) for _ in range(self._rng.randint(*PROMPTS))]
            await asyncio.sleep(began + at - time.monotonic())
            asked.append(asyncio.create_task(self._ask(prompt)))
        await asyncio.gather(*asked)

    async def _ask(self, prompt: list[int]) -> None:
        began = time.monotonic()
        self.found["asked"] += 1
        try:
            first_s = await self._first_token(prompt, DEADLINE_S)
        except Overloaded:
            self.found["refused"] += 1
            self.refused_after.append(time.monotonic() - began)
            if self._rng.random() < self._again:
                self.found["asked again"] += 1
                await self._first_token(prompt, None)
                self.found["wrongly"] += time.monotonic() - began <= DEADLINE_S
        except DeadlineExceeded:
            self.found["missed"] += 1
        else:
            self.found["met" if first_s <= DEADLINE_S else "missed"] += 1

    async def _first_token(self, prompt: list[int], timeout: float | None) -> float:
        began = time.monotonic()
        stream = self._client.stream(prompt, timeout=timeout, max_tokens=TOKENS, ignore_eos=True)
        first_s = None
        async for _ in stream:
            first_s = first_s or time.monotonic() - began
            if timeout is None:
                break
        assert first_s is not None
        return first_s


async def measure(target: str, options: argparse.Namespace) -> Trial:
    """The trial, after requests in turn from which the gateway learns what prompts take."""
    async with AsyncClient(target) as client:
        trial = Trial(client, random.Random(options.seed), options.again)
        for tokens in range(PROMPTS[0], PROMPTS[1], 50):
            await client.generate([5 + tokens % 200] * tokens, max_tokens=2, ignore_eos=True)
        await trial.run(options.load * 2 / PROMPT_S, options.seconds)
        return trial


def main() -> None:
    """Runs it and prints the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--load", type=float, default=1.5, help="of what can be computed")
    parser.add_argument("--again", type=float, default=0.3, help="share of the refused")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with running(spec(f"deadlines-{os.getpid()}", POOLS, "simulated")) as cluster:
        trial = asyncio.run(measure(cluster.grpc, options))
    found, after = trial.found, sorted(trial.refused_after)
    print(", ".join(f"{count} {what}" for what, count in found.items()))
    if found["asked again"]:
        of_them = found["wrongly"] / found["asked again"]
        wrong = of_them * found["refused"] / found["asked"]
        print(f"refused after {1000 * after[len(after) // 2]:.0f} ms, the median; wrongly "
              f"{of_them:.1%} of the refused, {wrong:.2%} of all")  # fmt: skip
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
