"""What one placement costs a gateway, and what its prefix index weighs.

    python benchmarks/decision.py                     # 2, 16, 100 and 1,000 workers, some 20 s
    python benchmarks/decision.py --blocks 10000000   # and the memory of so many blocks, some 60 s

Half of the workers prefill, half decode. Prompts are 64 blocks, their hashes given: one of four
system prompts of 8 blocks, which every prefill worker has, a conversation of which up to four
workers have a part, and a new message. Between two decisions the sequence is placed and four
workers report. `naive` walks the blocks one by one through a dict of the workers that have each.
Times are CPU time of one thread in µs, since the machine may have other work.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Callable
from typing import Any

from crossdock.proto.types import Role
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.latency import predicted_latency
from crossdock.router.placement.prefix_index import PrefixIndex
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import LoadReport, WorkerFacts, WorkerView

BLOCK, BLOCKS = 16, 64
SYSTEM_BLOCKS, CONVERSATION_BLOCKS = 8, 48
CONVERSATIONS = 200
REPORTS = 4
BLOCK_BYTES = 2_097_152  # of an 8B model in bfloat16


class Cluster:
    """A view of busy workers, and conversations that some of them hold."""

    def __init__(self, workers: int, seed: int = 1) -> None:
        self.rng, self.view, self.now = random.Random(seed), ClusterView(), 0.0
        self.naive: dict[bytes, set[int]] = {}
        for i in range(workers):
            role = Role.DECODE if i % 2 else Role.PREFILL
            facts = WorkerFacts(
                f"{role}-{i // 2}", role, f"{i}", num_blocks=8192, block_size=BLOCK,
                block_bytes=BLOCK_BYTES, pool=str(role), max_batch=64, chunk_tokens=2048,
            )  # fmt: skip
            self.view.connected(facts, self.now)
        self.workers = list(self.view.workers.values())
        for worker in self.workers:
            self.report(worker)
        systems = [self._chain(SYSTEM_BLOCKS) for _ in range(4)]
        self.conversations = [
            self.rng.choice(systems) + self._chain(CONVERSATION_BLOCKS)
            for _ in range(CONVERSATIONS)
        ]
        for worker in self.workers[::2]:
            for system in systems:
                self._hold(worker, system)
        for conversation in self.conversations:
            for worker in self.rng.sample(self.workers, min(4, workers)):
                self._hold(worker, conversation[: self.rng.randint(SYSTEM_BLOCKS, BLOCKS)])

    def demand(self) -> Demand:
        told = self.rng.choice(self.conversations)
        hashes = told + self._chain(BLOCKS - len(told))
        tokens = BLOCKS * BLOCK + 7
        return Demand(tokens, hashes, BLOCK, most_tokens=tokens + 256, local_tokens=128)

    def report(self, worker: WorkerView) -> None:
        """Half of the prefill workers have a queue; decode workers have 0 to 64 streams."""
        rng = self.rng
        rest = {"free_blocks": 6000, "cached_blocks": 1000, "total_blocks": 8192}
        if worker.role is Role.PREFILL:
            load = LoadReport(
                queued_tokens=rng.choice([0, rng.randint(1, 4000)]), prefill_base_s=0.005,
                prefill_tokens_per_s=20_000 + 100 * rng.random(), prefill_step_tokens=2048, **rest,
            )  # fmt: skip
        else:
            load = LoadReport(
                running=rng.randint(0, 64), step_base_s=0.01 + 0.001 * rng.random(),
                step_per_sequence_s=0.0001, **rest,
            )  # fmt: skip
        self.view.reported(worker, load, self.now)

    def pass_time(self, key: str, demand: Demand, prefill: str | None, decode: str) -> None:
        """What a gateway is told between two decisions."""
        self.now += 0.001
        view, first = self.view, prefill or decode
        view.place(first, key, demand.num_tokens, demand.blocks)
        view.place(decode, key, 0, demand.blocks)
        view.sent(first, key, self.now)
        view.transferred(first, decode, 64 * BLOCK_BYTES, 0.02 + 0.01 * self.rng.random())
        for worker in self.rng.sample(self.workers, min(REPORTS, len(self.workers))):
            self.report(worker)
        for name in (first, decode):
            view.unplace(name, key)

    def walk(self, hashes: list[bytes]) -> dict[int, int]:
        """Slot -> depth, block by block."""
        depths: dict[int, int] = {}
        holders = self.naive.get(hashes[0], set())
        for depth, block_hash in enumerate(hashes, 1):
            holders = holders & self.naive.get(block_hash, set())
            if not holders:
                break
            for slot in holders:
                depths[slot] = depth
        return depths

    def _chain(self, blocks: int) -> list[bytes]:
        return [self.rng.randbytes(16) for _ in range(blocks)]

    def _hold(self, worker: WorkerView, blocks: list[bytes]) -> None:
        for block_hash in blocks:
            self.view.index.add(worker.slot, block_hash)
            self.naive.setdefault(block_hash, set()).add(worker.slot)


def decisions(workers: int, count: int) -> dict[str, float]:
    """Percentiles in µs: a whole decision, the look-up in it, and a naive walk instead of that."""
    cluster = Cluster(workers)
    index, spent = cluster.view.index, {"decision": [], "look-up": [], "naive": []}

    def timed(what: str, action: Callable[..., Any], *given: Any) -> Any:
        started = time.thread_time_ns()
        found = action(*given)
        spent[what].append((time.thread_time_ns() - started) / 1000)
        return found

    for i in range(count):
        demand = cluster.demand()
        hashes = list(demand.block_hashes)
        given = cluster.view, demand, cluster.now, cluster.rng, i
        placed = timed("decision", predicted_latency, *given)
        levels = timed("look-up", index.levels, hashes)
        walked = timed("naive", cluster.walk, hashes)
        assert {s: d for m, d in levels for s in walked if m >> s & 1} == walked
        cluster.pass_time(f"s{i}", demand, placed.prefill, placed.decode)
    figures = {}
    for what, times in spent.items():
        times.sort()
        for share in (50, 99):
            figures[f"{what} p{share}"] = times[len(times) * share // 100]
    return figures


def memory(blocks: int, workers: int = 1000, holders: int = 1) -> float:
    """GB that the index of so many blocks takes, each held by so many workers; told as workers tell
    them, 64 at a time."""
    rng, index = random.Random(1), PrefixIndex()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(blocks // BLOCKS):
        names = [rng.randbytes(16) for _ in range(BLOCKS)]
        for slot in rng.sample(range(workers), holders):
            for name in names:
                index.add(slot, bytes(bytearray(name)))  # each worker's own copy, as from the wire
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 16, 100, 1000])
    parser.add_argument("--count", type=int, default=2000, help="decisions each")
    parser.add_argument("--blocks", type=int, default=0, help="of which the memory is measured")
    parser.add_argument("--holders", type=int, default=1, help="workers that hold each of them")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    for workers in args.workers:
        figures = report[f"{workers} workers"] = decisions(workers, args.count)
        told = "  ".join(f"{what} {value:7.1f}" for what, value in figures.items())
        print(f"{workers:5} workers  {told}", flush=True)
    if args.blocks:
        gigabytes = report["index GB"] = memory(args.blocks, holders=args.holders)
        print(f"{args.blocks} blocks, {args.holders} holders each: {gigabytes:.2f} GB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
