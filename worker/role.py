"""What the engine loop and the service ask of a role, and what all roles have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import SampledToken, StepPlan
from crossdock.kvtransfer.transport import Transport
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.memory import PoolMemory
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker import tracing
from crossdock.worker.config import WorkerConfig
from crossdock.worker.job import Job
from crossdock.worker.outbox import Outbox
from crossdock.worker.rates import StepTimes
from crossdock.worker.scheduler import Scheduler


def _counter(doc: str, zero: float = 0) -> Any:
    return field(default=zero, metadata={"doc": doc})


@dataclass
class Counters:
    """Since the worker started. Metrics show what has a documentation."""

    prompt_tokens: int = _counter("Prompt tokens of the sequences whose prompt was served here.")
    cached_tokens: int = _counter("Of those, tokens whose KV was in the prefix cache.")
    computed_tokens: int = _counter("Prompt tokens computed here.")
    generated_tokens: int = _counter("Tokens generated here.")
    transferred_bytes: int = _counter("KV bytes pulled from prefill workers and fenced.")
    transferred_blocks: int = _counter("KV blocks pulled from prefill workers and fenced.")
    late_bytes: int = _counter(
        "Of transferred_bytes, what had not been pulled when the prompt was computed."
    )
    recomputed_tokens: int = _counter(
        "Prompt tokens computed here although their KV had been handed off."
    )
    preemptions: int = _counter("Sequences handed back for want of KV blocks.")
    steps: int = _counter("Engine steps.")
    step_seconds: float = _counter("Seconds spent in engine steps.", 0.0)
    errors: Counter[str] = field(default_factory=Counter)  # by code, in lower case


@dataclass
class WorkerState:
    """What a role works on. Everything here belongs to the engine thread."""

    config: WorkerConfig
    pool: BlockPool
    hasher: BlockHasher
    context_length: int
    layout_hash: bytes
    incarnation: bytes
    transport: Transport
    memory: PoolMemory
    address: str  # of this worker's gRPC service
    lookahead: int = 0  # tokens that a step may draw for a sequence beyond the first
    ticket_releases: list[tuple[str, bytes]] = field(default_factory=list)  # (peer, ticket id)
    outbox: Outbox = field(default_factory=Outbox)
    counters: Counters = field(default_factory=Counters)
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time  # of deadlines, which gateways set


class WorkerRole(ABC):
    """A scheduler with its hand-off half. Every method is called by the engine thread alone."""

    _scheduler: Scheduler

    def __init__(self, state: WorkerState) -> None:
        self.state = state
        self.jobs: dict[str, Job] = {}
        self.draining = False
        self.step_times = StepTimes()

    # What each role does its own way.

    @abstractmethod
    def _admit(self, job: Job) -> None:
        """Queues a job that passed the common checks. May raise CrossdockError."""

    @abstractmethod
    def _forget(self, job: Job) -> None:
        """Takes a job out of the scheduler, whatever its state, and frees what it holds."""

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run. May start pulls and preempt."""

    @abstractmethod
    def apply(self, plan: StepPlan, tokens: list[list[SampledToken]]) -> None:
        """Takes a step's results: the new tokens of each chunk, in plan order."""

    @abstractmethod
    def poll(self) -> None:
        """Leases, transfers, notifications: all that moves without a step."""

    @abstractmethod
    def next_deadline(self) -> float | None:
        """Monotonic time at which poll has something to do even if nothing arrives."""

    @abstractmethod
    def held(self) -> Iterable[Sequence[int]]:
        """Every list of block references that is owned now, for check_integrity."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Nothing is running, waiting, offered or being pulled."""

    def owner_gone(self, owner: str) -> None:
        """A gateway's stream ended: frees all that it had here."""
        for job in [job for job in self.jobs.values() if job.owner == owner]:
            self._end(job)

    # Tickets. By default none is offered or read here.

    def leases(self) -> list[pb.Lease]:
        """The tickets offered here and not read yet, oldest first."""
        return []

    def renew_tickets(self, ticket_ids: Iterable[bytes], lease_s: float) -> list[bytes]:
        """Extends open leases to `lease_s` seconds from now; returns the ids that are not open."""
        return list(ticket_ids)

    def release_tickets(self, ticket_ids: Iterable[bytes]) -> None:
        """Ends the leases and gives their blocks back; ids that are not open are ignored."""
        return

    def hand_off(self, hand_off: pb.HandOff, owner: str) -> None:
        """Takes how far a ticket's prompt is; news that is old, or of no job here, is ignored."""
        return

    def waiting_tickets(self) -> list[tuple[str, bytes]]:
        """(prefill address, ticket id) of every ticket read here that still needs its lease."""
        return []

    def leases_renewed(self, answer: tuple[set[bytes], set[bytes]], until: float) -> None:
        """What was answered of waiting_tickets: ids renewed until a monotonic time, ids lost."""
        return

    # What they share.

    def submit(self, job: Job) -> None:
        """Takes a job or answers at once with why not."""
        state = self.state
        if self.draining:
            self._refuse(job, pb.ERROR_CODE_DRAINING, f"{state.config.name} is draining")
        elif len(self.jobs) >= state.config.max_waiting + state.config.max_batch:
            message = f"{state.config.name} holds {len(self.jobs)} sequences, its limit"
            self._refuse(job, pb.ERROR_CODE_OVERLOADED, message)
        elif job.id in self.jobs:
            self._refuse(job, pb.ERROR_CODE_INVALID, f"sequence_id {job.id!r} is in use")
        else:
            self.jobs[job.id] = job
            self._admit(job)

    def job_of(self, sequence_id: str, owner: str) -> Job | None:
        """The job that this gateway's stream brought; None: it has ended, or is another's."""
        job = self.jobs.get(sequence_id)
        return job if job is not None and job.owner == owner else None

    def cancel(self, sequence_id: str, reason: str, owner: str) -> None:
        """Frees a sequence and answers nothing: the gateway has already released it."""
        job = self.job_of(sequence_id, owner)
        if job is not None:
            self._end(job, reason or "cancelled")

    def fail(self, job: Job, code: pb.ErrorCode, message: str) -> None:
        """Ends a job with an error that its gateway sees."""
        self._end(job, message)
        self._refuse(job, code, message)

    def eject_all(self, code: pb.ErrorCode, message: str) -> None:
        """Ends every job with an error that its gateway sees."""
        for job in list(self.jobs.values()):
            self.fail(job, code, message)

    def check_deadlines(self) -> None:
        """Ends the jobs whose deadline has passed, on the wall clock."""
        now = self.state.wall_clock()
        for job in list(self.jobs.values()):
            if job.deadline_unix_s is not None and now >= job.deadline_unix_s:
                self.fail(job, pb.ERROR_CODE_DEADLINE, "the request's deadline passed")

    def step_failed(self, plan: StepPlan, code: pb.ErrorCode, message: str) -> None:
        """The model raised: its sequences end; of a DEVICE they go on elsewhere."""
        for chunk in plan.chunks:
            self.fail(self.jobs[chunk.sequence.sequence_id], code, message)

    def observe_step(self, plan: StepPlan, seconds: float) -> None:
        """Counts a step that took so many seconds, and fits the rates that `load` reports."""
        counters = self.state.counters
        counters.steps += 1
        counters.step_seconds += seconds
        self.step_times.observe(plan.work, seconds)

    def expected_s(self, plan: StepPlan) -> float:
        """Seconds that a step takes as far as was measured; 0 where nothing was."""
        return self.step_times.seconds(plan.work)

    def _end(self, job: Job, reason: str = "") -> None:
        """Every job's one way out, but for the tokens that end well."""
        del self.jobs[job.id]
        self._forget(job)
        tracing.record(job, self.state.config, error=reason or None)

    def _refuse(self, job: Job, code: pb.ErrorCode, message: str) -> None:
        name = pb.ErrorCode.Name(code).removeprefix("ERROR_CODE_").lower()
        self.state.counters.errors[name] += 1
        self.state.outbox.error(job.owner, job.id, code, message)

    @property
    def waiting(self) -> int:
        """Sequences here that no step advances yet."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Sequences here that steps advance."""
        return self._scheduler.running

    def load(self) -> pb.Load:
        """What gateways choose workers by, as of this turn."""
        pool, scheduler = self.state.pool, self._scheduler
        prompts, step, queued = (
            self.step_times.prompts,
            self.step_times.decode.line,
            scheduler.queued,
        )
        return pb.Load(
            waiting=scheduler.waiting,
            running=scheduler.running,
            queued_tokens=queued.tokens,
            queued_attention=round(queued.attention),
            yielding_tokens=queued.yielding_tokens,
            yielding_attention=round(queued.yielding_attention),
            late_tokens=queued.late_tokens,
            late_attention=round(queued.late_attention),
            context_tokens=scheduler.context_tokens,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_evictable,
            total_blocks=pool.num_blocks,
            prefill_tokens_per_s=1 / prompts.line.slope if prompts.line.slope else 0.0,
            prefill_base_s=prompts.line.base,
            prefill_alike=0 < 2 * prompts.largest <= self.state.config.chunk_tokens
            and not prompts.told_apart,
            prefill_attention_s=prompts.line.context,
            prefill_step_tokens=round(prompts.largest),
            step_base_s=step.base,
            step_per_sequence_s=step.slope,
            step_context_s=step.context,
            draining=self.draining,
        )
