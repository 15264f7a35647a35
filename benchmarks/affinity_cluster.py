"""What placement is worth on real clusters: prompts of eight families, each with a prefix of its
own, on two prefill workers, whose pools hold the prefixes of five families each.

Three clusters stand side by side, with a simulated engine and all else real: predicted_latency,
round_robin, and predicted_latency behind two gateways whose clients take turns. They get the same
requests one after another, several rounds, each with new prefixes, so that what else the machine
does falls on all alike.

    python benchmarks/affinity_cluster.py --rounds 3 --seconds 20 --json affinity.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import clusters

from crossdock.bench.run import describe_machine
from crossdock.client import AsyncClient
from crossdock.tables import console_of, table

FAMILIES, PREFIX_TOKENS, OWN_TOKENS, TOKENS = 8, 2048, 160, 4
RATE = 4.0  # requests a second
KV_BYTES = 256  # of a token
POOL_MB = 3  # of a prefill worker: 11,700 tokens, five families and what is being computed
YAML = """\
apiVersion: crossdock/v1
kind: Cluster
metadata: {{name: {name}}}
model: {{id: simulated}}
gateway: {{replicas: {gateways}, policy: {policy}, grpc: "127.0.0.1:{grpc}",
          http: "127.0.0.1:{http}"}}
controller: {{grpc: "127.0.0.1:{admin}"}}
kv: {{transport: local, block_size: 16}}
pools:
  prefill: {{role: prefill, replicas: 2, kv_memory_mb: {pool}, chunk_tokens: 512, {worker}}}
  decode:  {{role: decode,  replicas: 1, kv_memory_mb: 64, {worker}}}
"""
# A prompt takes 0.49 s, one whose prefix is cached 0.05 s.
WORKER = f"""resources: {{cpus: 0.05}}, engine: {{kind: simulated, profile: {{
    kv_bytes_per_token: {KV_BYTES}, prefill_s: 0.01, prefill_token_s: 2.0e-4, decode_s: 0.01}}}}"""


@dataclass
class Kind:
    """A cluster, and what its requests saw."""

    name: str
    policy: str
    gateways: int = 1
    ttft: list[float] = field(default_factory=list)  # seconds, at the gateway
    hit_tokens: int = 0
    prompt_tokens: int = 0

    def yaml(self) -> str:
        grpc, http, admin = consecutive(self.gateways), consecutive(self.gateways), consecutive(1)
        return YAML.format(
            name=f"affinity-{self.name}-{os.getpid()}", gateways=self.gateways, policy=self.policy,
            grpc=grpc, http=http, admin=admin, pool=POOL_MB, worker=WORKER,
        )  # fmt: skip

    def row(self, base: Kind) -> list[str]:
        """Of the table; `base` is what it is compared with."""
        hits, p50 = self.hit_tokens / self.prompt_tokens, statistics.median(self.ttft)
        return [
            self.name, str(len(self.ttft)), str(self.hit_tokens), f"{hits:.1%}",
            f"{self.hit_tokens / base.hit_tokens:.3f}", f"{1000 * p50:.1f} ms",
            f"{p50 / statistics.median(base.ttft):.3f}",
        ]  # fmt: skip


def consecutive(count: int) -> int:
    """The first of so many free ports in a row: gateway i listens on both ports + i."""
    while True:
        (first,) = clusters.free_ports(1)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


async def load(kind: Kind, targets: Sequence[str], seconds: float, seed: int) -> None:
    """Poisson arrivals for so long; gateways take turns."""
    rng = random.Random(seed)
    prefixes = [_tokens(rng, PREFIX_TOKENS) for _ in range(FAMILIES)]
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(each)) for each in targets]
        began, asked, at = time.monotonic(), [], 0.0
        while (at := at + rng.expovariate(RATE)) < seconds:
            prompt = rng.choice(prefixes) + _tokens(rng, OWN_TOKENS)
            await asyncio.sleep(began + at - time.monotonic())
            client = clients[len(asked) % len(clients)]
            asked.append(asyncio.create_task(_ask(kind, client, prompt)))
        await asyncio.gather(*asked)


async def _ask(kind: Kind, client: AsyncClient, prompt: list[int]) -> None:
    result = await client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
    assert result.timings is not None and result.timings.ttft is not None
    kind.ttft.append(result.timings.ttft)
    kind.hit_tokens += result.usage.cached_tokens
    kind.prompt_tokens += result.usage.prompt_tokens


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(count)]


def main() -> None:
    """Runs the rounds and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a cluster in a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = Kind("round-robin", "round_robin")
    kinds = [base, Kind("ours", "predicted_latency"), Kind("ours-2", "predicted_latency", 2)]
    with contextlib.ExitStack() as stack:
        targets = []
        for kind in kinds:
            cluster = stack.enter_context(clusters.running(kind.yaml()))
            host, _, port = cluster.grpc.rpartition(":")
            targets.append([f"{host}:{int(port) + i}" for i in range(kind.gateways)])
        for number in range(options.rounds):
            for kind, those in zip(kinds, targets, strict=True):
                asyncio.run(load(kind, those, options.seconds, options.seed + number))
    columns = ("cluster", "requests", "hit tokens", "of the prompts", "ratio", "TTFT p50", "ratio")
    rows = [kind.row(base) for kind in kinds]
    console_of().print(table("Eight families on two prefill workers", columns, rows, columns[1:]))
    one, two = kinds[1:]
    print(f"two gateways' hit tokens over one's: {two.hit_tokens / one.hit_tokens:.3f}")
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if options.json is not None:
        told = [vars(kind) | {"ttft": sorted(kind.ttft)} for kind in kinds]
        report = {"machine": describe_machine(), "clusters": told}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
