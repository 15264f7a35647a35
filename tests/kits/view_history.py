"""Clusters to which anything may happen, and demands on them: what must hold of any decision."""

from __future__ import annotations

import random

from crossdock.proto.types import Role
from crossdock.router.placement.demand import Demand, Placement
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import LoadReport, WorkerFacts

BLOCK = 16
ROLES = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.COLOCATED]
STEPS = 30  # of one cluster's history, with a decision after each


class History:
    """A cluster to which anything may happen."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now, self.view = random.Random(seed), 0.0, ClusterView()
        self.chains = [[self.rng.randbytes(16) for _ in range(40)] for _ in range(4)]
        self.roles = self.rng.choice([ROLES, ROLES[:4], ROLES[-1:], ROLES[1:]])
        self.most = self.rng.choice([3, 12, 60, 150])
        self.plain = self.rng.random() < 0.5  # equal workers, so that ties are many
        self.placed: list[tuple[str, str]] = []
        for i in range(self.most):
            self.connect(f"w{i}")
        for name in self.view.workers:
            if self.rng.random() < 0.8:
                self.report(name)
        for _ in range(self.most // 2):
            self.cache()

    def connect(self, name: str) -> None:
        rng = self.rng
        self.view.connected(
            WorkerFacts(
                name, rng.choice(self.roles), rng.randbytes(4).hex(), 1000, BLOCK,
                block_bytes=100_000, pool=rng.choice("ab"),
                context_length=0 if self.plain else rng.choice([0, 0, 600, 900]),
                max_batch=rng.choice([0, 8]), chunk_tokens=rng.choice([0, 256]),
            ),
            self.now,
        )  # fmt: skip

    def report(self, name: str) -> None:
        rng, idle = self.rng, self.plain and self.rng.random() < 0.7
        busy = 0 if idle else rng.choice([0, 3, 9])
        known, queued = rng.random() < 0.8, busy * rng.choice([0, 0, 5, 400])
        load = LoadReport(
            waiting=busy // 3, running=busy, queued_tokens=queued,
            free_blocks=rng.choice([5, 900, 900]), cached_blocks=rng.randrange(40),
            total_blocks=rng.choice([0, 1000, 1000]), draining=rng.random() < 0.05,
            late=rng.random() < 0.05, prefill_tokens_per_s=known * (3000 + 500 * rng.random()),
            prefill_base_s=0.01 * rng.random(), prefill_step_tokens=rng.choice([0, 20, 256]),
            step_base_s=known * 0.02 * rng.random(), step_per_sequence_s=0.0001,
            prefill_attention_s=rng.choice([0, 1e-7]), step_context_s=rng.choice([0, 1e-6]),
            queued_attention=queued and busy * 1000, context_tokens=busy * 500,
            yielding_tokens=min(queued, busy // 4), yielding_attention=queued and busy * 100,
            late_tokens=min(queued, busy // 3), late_attention=queued and busy * 50,
        )  # fmt: skip
        self.view.reported(self.view.workers[name], load, self.now)

    def cache(self) -> None:
        rng, view = self.rng, self.view
        if view.workers:
            chain = rng.choice(self.chains)[: rng.randrange(40)]
            view.index.replace(rng.choice(list(view.workers.values())).slot, chain)

    def happens(self) -> None:
        """A little of everything."""
        rng, view = self.rng, self.view
        self.now += rng.choice([0.0, 0.01, 0.3, 1.2])
        for _ in range(rng.randrange(6)):
            names = list(view.workers)
            one, other = (rng.choice(names or [""]) for _ in range(2))
            kind = rng.randrange(8)
            if kind == 0 and one:
                view.disconnected(one, view.workers[one].facts.incarnation)
            elif kind == 1:
                self.connect(f"w{rng.randrange(self.most)}")
            elif kind == 2:
                self.cache()
            elif kind == 3:
                view.transferred(one, other, rng.randrange(10**9), rng.random())
            elif kind == 4:
                view.pull_failed(one, other, self.now)
            elif kind == 5:
                view.device_failed(one, self.now)
                view.ended(one, "tenant", 100, rng.randrange(300))
            elif kind == 6 and self.placed:
                name, key = self.placed.pop(rng.randrange(len(self.placed)))
                rng.choice([view.unplace, lambda n, k: view.sent(n, k, self.now)])(name, key)
            elif one:
                self.report(one)

    def demand(self) -> Demand:
        rng = self.rng
        tokens = rng.choice([1, 200, 640, 655])
        names = list(self.view.workers)
        avoid = rng.sample(names, min(len(names), rng.choice([0, 0, 0, 1, 3])))
        return Demand(
            tokens, rng.choice(self.chains)[: tokens // BLOCK], BLOCK, most_tokens=tokens + 200,
            avoid=frozenset(avoid), local_tokens=rng.choice([0, 100, 400]),
            yields=rng.choice([0, 0, 0, 1, 2]), output=rng.choice([1.0, 50.0, 333.3]),
            tpot_s=rng.choice([float("inf"), 0.01]), answered_by=rng.choice(["", *names]),
        )  # fmt: skip

    def placed_as(self, placement: Placement, demand: Demand, key: str) -> None:
        """The sequence goes there, and its workers have not counted it yet."""
        for name in {placement.prefill or placement.decode, placement.decode}:
            tokens, context = placement.uncached_tokens, demand.num_tokens
            cached, yields = context - tokens, demand.yields
            self.view.place(name, key, tokens, demand.blocks, cached, context, yields)
            self.placed.append((name, key))
