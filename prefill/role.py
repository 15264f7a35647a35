"""The prefill role: computes prompts, draws token 0 and offers the KV behind a ticket."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from crossdock.kvcache import block_tables
from crossdock.kvcache.block_tables import blocks_for
from crossdock.kvcache.sequence import SampledToken, StepPlan, take_tokens
from crossdock.kvtransfer.checksum import checksums
from crossdock.kvtransfer.offers import Offers, OfferSettings
from crossdock.prefill.scheduler import PrefillScheduler
from crossdock.proto.identity import Credentials
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker import tracing
from crossdock.worker.config import WorkerConfig
from crossdock.worker.job import Job
from crossdock.worker.role import WorkerRole, WorkerState
from crossdock.worker.server import WorkerServer

FIXED_PART = 0.1  # of a step's time: prompts share a step until its fixed part is no more


class PrefillRole(WorkerRole):
    """Owns a prompt's blocks until its ticket's lease takes them; the lease's end frees them.

    With `reserve` early the ticket is announced as soon as there is a block to read.
    """

    _scheduler: PrefillScheduler

    def __init__(self, state: WorkerState) -> None:
        super().__init__(state)
        self._scheduler = PrefillScheduler(state.pool, state.config.chunk_tokens, state.lookahead)
        settings = OfferSettings(
            worker=state.config.name,
            address=state.address,
            incarnation=state.incarnation,
            layout_hash=state.layout_hash,
            cluster_key=state.config.cluster_key,
            lease_s=state.config.lease_s,
        )
        self._offers = Offers(state.clock, settings, state.pool.release)

    def _admit(self, job: Job) -> None:
        job.mark("prefill_queued")
        self._scheduler.add(job.sequence)

    def schedule(self) -> StepPlan | None:
        """The next chunks; a ticket goes out at once for what the prefix cache holds."""
        plan = self._scheduler.schedule(self._together)
        for chunk in plan.chunks if plan else ():
            if chunk.start == chunk.sequence.num_cached:
                job = self.jobs[chunk.sequence.sequence_id]
                job.mark("prefill_started")
                self._announce(job)  # what was found in the prefix cache
        return plan

    @property
    def _together(self) -> float:
        """Tokens of a step whose fixed part is small. Where that is not known prompts share steps,
        from which it is learned."""
        fit = self.step_times.prefill
        if not fit.told_apart or not fit.line.slope:
            return math.inf
        return fit.line.base / fit.line.slope * (1 / FIXED_PART - 1)

    def apply(self, plan: StepPlan, tokens: list[list[SampledToken]]) -> None:
        """Announces the blocks that a step filled; a finished prompt gives token 0 and a ticket."""
        for chunk, drawn in zip(plan.chunks, tokens, strict=True):
            self._scheduler.computed(chunk, len(drawn))
            self.state.counters.computed_tokens += chunk.length
            job = self.jobs[chunk.sequence.sequence_id]
            if chunk.scores is not None:
                self.state.outbox.scores(job, chunk.scores)
            if chunk.sequence.num_uncomputed:
                self._announce(job)
                continue
            del self.jobs[job.id]
            self._first_tokens(job, drawn)

    def _announce(self, job: Job) -> None:
        """The blocks that are ready may be read while the rest is computed."""
        sequence = job.sequence
        one_token = sequence.num_generated + 1 >= sequence.sampling.max_tokens
        if self.state.config.reserve == "late" or sequence.num_sealed == 0 or one_token:
            return
        self.state.outbox.progress(job, self._progress(job, sequence.num_tokens))

    def _progress(self, job: Job, num_tokens: int) -> pb.PromptProgress:
        """How far the prompt of `num_tokens` is; its ticket is made, and told, once."""
        progress = pb.PromptProgress(ready_blocks=job.sequence.num_sealed)
        if job.ticket is None:
            progress.ticket.CopyFrom(self._ticket(job, num_tokens))
            job.progress.CopyFrom(progress)
        return progress

    def _ticket(self, job: Job, num_tokens: int) -> pb.Ticket:
        sequence = job.sequence
        blocks = sequence.block_table[: blocks_for(num_tokens, self.state.pool.block_size)]
        generations = self.state.pool.generations[blocks].tolist()
        prompt_hash = self.state.hasher.prompt(
            sequence.token_ids[:num_tokens], sequence.block_hashes, sequence.root_hash
        )
        return self._offers.announce(blocks, generations, num_tokens, prompt_hash)

    def _first_tokens(self, job: Job, drawn: list[SampledToken]) -> None:
        sequence, counters = job.sequence, self.state.counters
        counters.prompt_tokens += sequence.num_tokens
        tokens, finish = take_tokens(sequence, drawn, self.state.context_length)
        if drawn:
            job.mark("first_token")
        else:
            finish = FinishReason.LENGTH, ""  # it asks for no token
        counters.cached_tokens += sequence.num_cached
        counters.generated_tokens += len(tokens)
        if finish:
            self.state.outbox.tokens(job, tokens, finish)
            block_tables.release(self.state.pool, sequence)
        else:
            self._offer(job, tokens)
        tracing.record(job, self.state.config)

    def _offer(self, job: Job, tokens: list[SampledToken]) -> None:
        """The prompt's blocks pass to the lease; others that its tokens were given go back."""
        progress = self._progress(job, job.sequence.num_computed)
        ticket = job.progress.ticket
        progress.ready_blocks = len(ticket.block_ids)
        self.state.pool.release(job.sequence.block_table[len(ticket.block_ids) :])
        job.sequence.block_table = []
        job.mark("ticket_offered")
        self._offers.offer(ticket, job.id, job.owner)
        if self.state.config.verify == "checksum":
            progress.checksums.extend(checksums(self.state.memory, ticket.block_ids))
        self.state.outbox.tokens(job, tokens, None, progress)

    def _forget(self, job: Job) -> None:
        self._scheduler.remove(job.sequence)

    def cancel(self, sequence_id: str, reason: str, owner: str) -> None:
        """Also revokes the sequence's offered ticket, if that gateway's stream owns it."""
        super().cancel(sequence_id, reason, owner)
        self._offers.revoke_sequence(sequence_id, owner)

    def owner_gone(self, owner: str) -> None:
        """Also revokes every ticket that was offered for that gateway's stream."""
        super().owner_gone(owner)
        self._offers.revoke_owner(owner)

    def release_tickets(self, ticket_ids: Iterable[bytes]) -> None:
        self._offers.release(ticket_ids)

    def renew_tickets(self, ticket_ids: Iterable[bytes], lease_s: float) -> list[bytes]:
        return self._offers.renew(ticket_ids, lease_s)

    def poll(self) -> None:
        """Takes the releases that readers notified, and ends leases that are over."""
        self._offers.release(self.state.transport.notifications())
        self._offers.reap()
        self.state.transport.expect_notifications(len(self._offers) > 0)

    def next_deadline(self) -> float | None:
        """When the first open lease ends, monotonic seconds; None: no lease is open."""
        return self._offers.next_deadline()

    def leases(self) -> list[pb.Lease]:
        now = self.state.clock()
        return [
            pb.Lease(
                ticket_id=lease.ticket_id,
                sequence_id=lease.sequence_id,
                owner=lease.owner,
                blocks=len(lease.block_ids),
                age_s=now - lease.offered_at,
                remaining_s=lease.deadline - now,
            )
            for lease in self._offers.open()
        ]

    def held(self) -> Iterable[Sequence[int]]:
        """Blocks of prompts under computation and of open leases."""
        return [*self._scheduler.held, *self._offers.held()]

    @property
    def idle(self) -> bool:
        """Neither a prompt nor an open lease is left."""
        return not self.jobs and len(self._offers) == 0


def create(config: WorkerConfig, credentials: Credentials | None = None) -> WorkerServer:
    """A worker that computes prompts; nothing is opened or loaded before its `start`."""
    return WorkerServer(config, PrefillRole, credentials)
