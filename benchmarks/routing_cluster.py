"""A cluster on a virtual clock, for trials of the router: the real policy, view, prefill scheduler,
block pool and fits; steps, links and decode workers are arithmetic. No wall-clock time goes by.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Sequence, StepPlan
from crossdock.prefill.scheduler import PrefillScheduler
from crossdock.proto.errors import Overloaded
from crossdock.proto.types import Role, SamplingParams
from crossdock.router.dispatch.deadlines import Deadlines
from crossdock.router.placement.demand import Demand, Placement
from crossdock.router.placement.latency import predicted_latency
from crossdock.router.placement.policy import Policy
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import LoadReport, WorkerFacts
from crossdock.worker import loop, rates

BLOCK = 16
BLOCK_BYTES = 400_000
NETWORK_S = 0.001
HEARTBEAT_S, WATCH_S = 1.0, 0.1
LOST_AFTER_S = 35.0  # an engine that stands still: 30 s of heartbeats, then 5 s of silence
SILENT_LOST_AFTER_S = 5.5  # a process that does

T = TypeVar("T")
Events = Iterable[tuple[bool, bytes]]  # of a prefix cache: (stored, hash)


def of(kind: type[T], **values: Any) -> T:
    """`kind` of those values that it knows: the trials run on earlier states of the code too."""
    if dataclasses.is_dataclass(kind):
        known = {entry.name for entry in dataclasses.fields(kind)}
    else:
        known = set(kind.DESCRIPTOR.fields_by_name)  # type: ignore[attr-defined]
    return kind(**{name: value for name, value in values.items() if name in known})


@dataclass
class Clock:
    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until


@dataclass(eq=False)
class Prompt:
    tokens: int
    hashes: list[bytes]
    arrived: float
    output: int = 0  # tokens to decode
    deadline: float | None = None
    ttft: float | None = None
    stall: float = 0.0  # token 0 to token 1
    prefill: str = ""
    decode: str = ""


@dataclass(frozen=True)
class Speed:
    """Seconds of a prefill step as base + tokens * per_token; of a decode step likewise."""

    base: float
    per_token: float
    chunk_tokens: int = 256
    step_base: float = 0.02
    step_per_sequence: float = 0.00002
    max_batch: int = 64


class PrefillWorker:
    """The real scheduler, pool and fit; a step is so many seconds."""

    def __init__(self, cluster: Cluster, name: str, blocks: int) -> None:
        self.cluster, self.name, self.clock = cluster, name, cluster.clock
        self.pool = BlockPool(blocks, BLOCK)
        self.scheduler = PrefillScheduler(self.pool, cluster.speed.chunk_tokens)
        self.fit = rates.StepFit(by_size=True)
        self.jobs: dict[str, Prompt] = {}
        self.hung = self.stepping = self.told_late = self.silent = False
        self.turned_at, self.due = 0.0, float("inf")
        self.load: dict[str, Any] = {}
        self.clock.after(HEARTBEAT_S, self._heartbeat)
        self.clock.after(WATCH_S, self._watch)

    def submit(self, key: str, prompt: Prompt) -> None:
        self.jobs[key] = prompt
        sequence = Sequence(
            key, [0] * prompt.tokens, prompt.tokens, SamplingParams(max_tokens=2),
            block_hashes=list(prompt.hashes), arrival=self.clock.now,
        )  # fmt: skip
        self.scheduler.add(sequence)
        self.turn()

    def turn(self) -> None:
        if self.stepping:
            return
        plan = self.scheduler.schedule()
        if plan is None:
            return
        self.stepping = True
        speed = self.cluster.speed
        seconds = speed.base + plan.num_tokens * speed.per_token
        self.due = self.clock.now + self._patience(plan)
        self.clock.after(seconds, lambda: self._stepped(plan, seconds))

    def _stepped(self, plan: StepPlan, seconds: float) -> None:
        if self.hung:
            return
        self.fit.observe(plan.work.tokens, plan.work.attention, seconds)
        for chunk in plan.chunks:
            self.scheduler.computed(chunk)
            if chunk.sample:
                prompt = self.jobs.pop(chunk.sequence.sequence_id)
                read_s = self.cluster.first_token(prompt, chunk.sequence.sequence_id)
                self.clock.after(read_s, lambda s=chunk.sequence: self._read(s))
        self.stepping, self.due = False, float("inf")
        self.report()
        self.turn()

    def _read(self, sequence: Sequence) -> None:
        block_tables.release(self.pool, sequence)
        self.turn()

    def _patience(self, plan: StepPlan) -> float:
        expected_s = self.fit.line.seconds(plan.work.tokens, plan.work.attention)
        expected_s = expected_s or loop.UNMEASURED_STEP_S
        return loop.LATE_FACTOR * expected_s + loop.LATE_S

    def report(self) -> None:
        """What an engine's turn tells: its load, and what its cache gained and lost."""
        self.turned_at = self.clock.now
        _, events = self.pool.drain_events()
        scheduler, pool = self.scheduler, self.pool
        self.load = self._measured() | {
            "waiting": scheduler.waiting, "running": scheduler.running,
            "queued_tokens": scheduler.queued.tokens,
            "queued_attention": round(scheduler.queued.attention), "free_blocks": pool.num_free,
            "cached_blocks": pool.num_evictable, "total_blocks": pool.num_blocks,
        }  # fmt: skip
        self._tell(events)

    def _measured(self) -> dict[str, float]:
        line = self.fit.line
        return {
            "prefill_base_s": line.base,
            "prefill_tokens_per_s": 1 / line.slope if line.slope else 0.0,
            "prefill_attention_s": line.context,
            "prefill_step_tokens": round(self.fit.largest),
        }

    def _tell(self, events: Events = ()) -> None:
        if self.silent:
            return
        late = self.clock.now > self.due
        load = of(LoadReport, **self.load, age_s=self.clock.now - self.turned_at, late=late)
        self.clock.after(NETWORK_S, lambda: self.cluster.take(self.name, load, events))

    def _heartbeat(self) -> None:
        if not self.stepping:
            self.report()
        elif self.clock.now - self.turned_at < LOST_AFTER_S:
            self._tell()
        self.clock.after(HEARTBEAT_S, self._heartbeat)

    def _watch(self) -> None:
        late = self.clock.now > self.due
        if late and not self.told_late:
            self._tell()
        self.told_late = late
        self.clock.after(WATCH_S, self._watch)


class DecodeWorker:
    """Streams that advance together, at most max_batch of them; the others wait."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name, self.clock = cluster, name, cluster.clock
        self.running: list[list[Any]] = []  # [tokens left, prompt]
        self.waiting: list[Prompt] = []
        self.stepping = False
        self.clock.after(HEARTBEAT_S, self._heartbeat)

    def submit(self, prompt: Prompt) -> None:
        self.waiting.append(prompt)
        self.turn()

    def turn(self) -> None:
        speed = self.cluster.speed
        while self.waiting and len(self.running) < speed.max_batch:
            self.running.append([self.waiting[0].output, self.waiting.pop(0)])
        if self.running and not self.stepping:
            self.stepping = True
            seconds = speed.step_base + speed.step_per_sequence * len(self.running)
            self.clock.after(seconds, self._stepped)

    def _stepped(self) -> None:
        for entry in self.running:
            if entry[0] == entry[1].output:
                entry[1].stall += self.clock.now
            entry[0] -= 1
        self.running = [entry for entry in self.running if entry[0] > 0]
        self.stepping = False
        self.turn()
        self.report()

    def report(self) -> None:
        speed, blocks = self.cluster.speed, 1_000_000
        load = of(
            LoadReport,
            waiting=len(self.waiting), running=len(self.running), free_blocks=blocks,
            total_blocks=blocks, step_base_s=speed.step_base,
            step_per_sequence_s=speed.step_per_sequence,
        )  # fmt: skip
        self.clock.after(NETWORK_S, lambda: self.cluster.take(self.name, load, []))

    def _heartbeat(self) -> None:
        self.report()
        self.clock.after(HEARTBEAT_S, self._heartbeat)


class Cluster:
    """One gateway's view and policy, and its workers."""

    def __init__(
        self,
        speed: Speed,
        prefills: int,
        decodes: int,
        seed: int = 1,
        blocks: int = 4096,
        policy: Policy = predicted_latency,
    ) -> None:
        self.policy = policy
        self.speed, self.clock, self.rng = speed, Clock(), random.Random(seed)
        self.view = ClusterView()
        self.bandwidth = 10e9  # bytes/s of every pair
        self.prompts: list[Prompt] = []
        self.placed: list[tuple[float, Placement]] = []
        self._count = 0
        self.workers: dict[str, Any] = {}
        for i in range(prefills):
            self._connect(f"p{i}", Role.PREFILL, blocks)
            self.workers[f"p{i}"] = PrefillWorker(self, f"p{i}", blocks)
        for i in range(decodes):
            self._connect(f"d{i}", Role.DECODE, 1_000_000)
            self.workers[f"d{i}"] = DecodeWorker(self, f"d{i}")
        for worker in self.workers.values():
            worker.report()
        self.clock.run(2 * NETWORK_S)

    def _connect(self, name: str, role: Role, blocks: int) -> None:
        facts = of(
            WorkerFacts,
            name=name, role=role, incarnation=name, num_blocks=blocks, block_size=BLOCK,
            block_bytes=BLOCK_BYTES, pool=str(role), max_batch=self.speed.max_batch,
            chunk_tokens=self.speed.chunk_tokens,
        )  # fmt: skip
        self.view.connected(facts, 0.0)

    def take(self, name: str, load: LoadReport, events: Events) -> None:
        worker = self.view.workers.get(name)
        if worker is None:
            return
        for stored, block in events:
            (self.view.index.add if stored else self.view.index.remove)(worker.slot, block)
        self.view.reported(worker, load, self.clock.now)

    def arrive(self, prompt: Prompt) -> None:
        """Places a prompt and sends it. Raises Overloaded where its deadline cannot be met."""
        demand = of(
            Demand, num_tokens=prompt.tokens, block_hashes=prompt.hashes, block_size=BLOCK,
            most_tokens=prompt.tokens + prompt.output + 1,
        )  # fmt: skip
        self._count += 1
        now, key = self.clock.now, f"s{self._count}"
        placement = self.policy(self.view, demand, now, self.rng, self._count)
        if placement.measured:
            asked: Any = SimpleNamespace(deadline=prompt.deadline)
            Deadlines(self.view).check(asked, placement.predicted_ttft_s, now)
        assert placement.prefill is not None
        self.placed.append((now, placement))
        prompt.prefill, prompt.decode = placement.prefill, placement.decode
        self.view.place(placement.prefill, key, placement.uncached_tokens, demand.blocks)
        self.view.place(placement.decode, key, 0, demand.blocks)
        self.view.sent(placement.prefill, key, now)
        worker = self.workers[placement.prefill]
        self.clock.after(NETWORK_S, lambda: worker.submit(key, prompt))

    def first_token(self, prompt: Prompt, key: str) -> float:
        """Token 0 is drawn: the decode worker pulls and goes on. Seconds until the KV is read."""
        now = self.clock.now
        prompt.ttft = now + NETWORK_S - prompt.arrived
        self.prompts.append(prompt)
        slot = self.view.workers[prompt.decode].slot
        held = self.view.index.depths(prompt.hashes).get(slot, 0)
        nbytes = (-(-prompt.tokens // BLOCK) - held) * BLOCK_BYTES
        pull_s = nbytes / self.bandwidth
        decode, prefill = prompt.decode, prompt.prefill

        def pulled() -> None:
            self.view.transferred(prefill, decode, nbytes, pull_s)
            for block in prompt.hashes:
                self.view.index.add(slot, block)
            self.view.unplace(prefill, key)
            self.view.sent(decode, key, self.clock.now)
            if prompt.output:
                prompt.stall -= now
                self.workers[decode].submit(prompt)
            else:
                self.view.unplace(decode, key)

        self.clock.after(pull_s, pulled)
        return pull_s

    def hang(self, name: str, silent: bool = False) -> None:
        """Its engine stands still, or its whole process (`silent`: a SIGSTOP), until it is lost."""
        worker = self.workers[name]
        worker.hung = worker.stepping = True
        worker.silent = silent
        if hasattr(loop, "LATE_S"):
            idle_s = loop.LATE_FACTOR * loop.IDLE_WAIT_S + loop.LATE_S
            worker.due = min(worker.due, self.clock.now + idle_s)
        lost_after_s = SILENT_LOST_AFTER_S if silent else LOST_AFTER_S
        self.clock.after(lost_after_s, lambda: self._lose(name))

    def _lose(self, name: str) -> None:
        self.view.disconnected(name, name)
        for prompt in self.workers[name].jobs.values():
            self.arrive(prompt)


def arrivals(cluster: Cluster, rate: float, seconds: float, make: Callable[[], Prompt]) -> None:
    """Poisson arrivals from now on; one whose deadline cannot be met is refused and gone."""
    rng = random.Random(7)

    def arrive() -> None:
        with suppress(Overloaded):
            cluster.arrive(make())

    at = rng.expovariate(rate)
    while at < seconds:
        cluster.clock.after(at, arrive)
        at += rng.expovariate(rate)


def chain(rng: random.Random, tokens: int, prefix: list[bytes] | None = None) -> list[bytes]:
    """Names of a prompt's full blocks, after those of a prefix that it shares."""
    names = list(prefix or [])
    return names + [rng.randbytes(16) for _ in range(tokens // BLOCK - len(names))]
