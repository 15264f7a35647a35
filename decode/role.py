"""The decode role: pulls offered KV, fences it, and generates until the end.

A job without a ticket computes its prompt here: that is all a colocated worker is.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from crossdock.decode.scheduler import DecodeScheduler
from crossdock.kvcache.sequence import Chunk, Finish, SampledToken, Sequence, StepPlan, take_tokens
from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.proto.errors import TransferFailed
from crossdock.proto.identity import Credentials
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker import tracing
from crossdock.worker.config import WorkerConfig
from crossdock.worker.job import Job
from crossdock.worker.role import WorkerRole, WorkerState
from crossdock.worker.server import WorkerServer


class DecodeRole(WorkerRole):
    """Owns a sequence's blocks from reservation to its end.

    Blocks of a pull that was given up stay quarantined until the transfer is terminal.
    """

    _scheduler: DecodeScheduler

    def __init__(self, state: WorkerState) -> None:
        super().__init__(state)
        config = state.config
        self._scheduler = DecodeScheduler(
            state.pool, config.max_batch, config.chunk_tokens, state.lookahead
        )
        self._puller = Puller(state.transport, state.memory, state.clock)
        self._pulls: dict[str, Job] = {}  # pull id -> job, also of jobs given up meanwhile
        self._quarantine: dict[str, list[int]] = {}  # pull id -> blocks of a job given up
        self._pull_ids = count()

    def _admit(self, job: Job) -> None:
        if job.ticket is None:
            job.mark("prefill_queued")
            self._scheduler.add(job.sequence)
            return
        job.mark("decode_queued")
        job.lease_end = self._lease_end(job.ticket)
        self._scheduler.add(job.sequence, remote_tokens=job.ticket.num_tokens)

    def schedule(self) -> StepPlan | None:
        """Starts the pulls of newly reserved sequences, then plans; hands back whom it preempts."""
        reserved, preempted = self._scheduler.reserve(self._preemptible())
        for sequence in preempted:
            self._preempted(sequence)  # before another pull reads into its blocks
        for sequence in reserved:
            self._start_pull(self.jobs[sequence.sequence_id])
        plan, preempted = self._scheduler.schedule(self._preemptible())
        for sequence in preempted:
            self._preempted(sequence)
        for chunk in plan.chunks if plan else ():
            job = self.jobs[chunk.sequence.sequence_id]
            if job.ticket is None and chunk.start == chunk.sequence.num_cached:
                job.mark("prefill_started")
        return plan

    def _preemptible(self) -> list[Sequence]:
        return [self._pulls[pull_id].sequence for pull_id in self._puller.preemptible()]

    def hand_off(self, hand_off: pb.HandOff, owner: str) -> None:
        """Takes how far a ticket's prompt is; older progress than what is known changes nothing."""
        job, progress = self.job_of(hand_off.sequence_id, owner), hand_off.progress
        if job is None or job.ticket is None or progress.ready_blocks <= job.progress.ready_blocks:
            return  # it has ended here, or this is old
        job.progress.MergeFrom(progress)
        job.lease_end = self._lease_end(job.ticket)
        if job.ready:
            self._append(job.sequence, hand_off.first_tokens)
        pull_id = self._pull_of(job)
        if pull_id is not None:
            self._puller.more(pull_id, job.progress, self._read_by(), job.lease_end)

    def _lease_end(self, ticket: pb.Ticket) -> float:
        """Until when a ticket is good if nothing more is heard of it. While the prompt is computed,
        each progress extends it; then the lease begins."""
        return self.state.clock() + ticket.lease_ms / 1000

    def _read_by(self) -> float:
        return self.state.clock() + self.state.config.pull_timeout_s

    def _start_pull(self, job: Job) -> None:
        assert job.ticket is not None and job.lease_end is not None
        job.mark("reserved")
        sequence, ticket = job.sequence, job.ticket
        wanted = slice(sequence.num_sealed, len(ticket.block_ids))
        pull_id = f"{job.id}#{next(self._pull_ids)}"
        self._pulls[pull_id] = job
        try:
            self._puller.start(
                pull_id=pull_id,
                progress=job.progress,
                remote_block_ids=list(ticket.block_ids[wanted]),
                local_block_ids=sequence.block_table[wanted],
                deadline=self._read_by(),
                lease_until=job.lease_end,
            )
        except TransferFailed as error:
            del self._pulls[pull_id]
            self._pull_failed(job, str(error))

    def cancel(self, sequence_id: str, reason: str, owner: str) -> None:
        """See WorkerRole.cancel. A stop string may have ended it, or its turn comes again."""
        job = self.job_of(sequence_id, owner)
        if job is not None:
            self._scheduler.ended(job.sequence)
        super().cancel(sequence_id, reason, owner)

    def poll(self) -> None:
        """Ends pulls that are terminal or overdue, and tickets whose lease ended unread."""
        for done in self._puller.poll():
            self._pull_ended(done)
        for pull_id in self._puller.overdue():
            if pull_id not in self._quarantine:
                self._pull_failed(self._pulls[pull_id], "the KV could not be pulled in time")
        now = self.state.clock()
        for job in list(self.jobs.values()):
            if job.lease_end is not None and now >= job.lease_end and not self._is_pulling(job):
                why = "the ticket's lease ended while the request waited for KV blocks"
                self._pull_failed(job, why)

    def _pull_failed(self, job: Job, why: str) -> None:
        self.fail(job, pb.ERROR_CODE_PULL_FAILED, why)

    def _pull_ended(self, done: PullDone) -> None:
        job = self._pulls.pop(done.pull_id)
        if done.released:
            job.lease_end = None
        blocks = self._quarantine.pop(done.pull_id, None)
        if blocks is not None:
            self.state.pool.release(blocks)
            self._give_back(job)
        elif done.error is not None:
            self._pull_failed(job, done.error)
        else:
            self._joined(job, done)

    def _joined(self, job: Job, done: PullDone) -> None:
        wall_offset = self.state.wall_clock() - self.state.clock()
        job.mark("pulled", done.pulled_at + wall_offset)
        job.mark("fenced", done.fenced_at + wall_offset)
        counters, job.transfer = self.state.counters, done.transfer
        counters.transferred_bytes += done.transfer.bytes
        counters.transferred_blocks += done.transfer.blocks
        counters.late_bytes += done.transfer.late_bytes
        self._scheduler.join(job.sequence)
        job.mark("joined")

    def apply(self, plan: StepPlan, tokens: list[list[SampledToken]]) -> None:
        """Passes each drawn token on; a sequence that has ended frees its blocks here."""
        for chunk, drawn in zip(plan.chunks, tokens, strict=True):
            job = self.jobs[chunk.sequence.sequence_id]
            ends_here = chunk.end == chunk.sequence.num_tokens and not chunk.sequence.draws
            self._count(job, chunk, bool(drawn) or ends_here)
            taken, finish = take_tokens(chunk.sequence, drawn, self.state.context_length)
            self._append(chunk.sequence)
            self._scheduler.computed(chunk, len(taken))
            if chunk.scores is not None:
                self.state.outbox.scores(job, chunk.scores)
            if taken:
                self._gained(job, taken, finish)
            elif ends_here:
                self.state.outbox.tokens(job, [], (FinishReason.LENGTH, ""))
                self._end(job)

    def _count(self, job: Job, chunk: Chunk, whole: bool) -> None:
        sequence, counters = job.sequence, self.state.counters
        prompt_part = min(chunk.start + chunk.length, sequence.prompt_tokens) - chunk.start
        if prompt_part <= 0:
            return
        counters.computed_tokens += prompt_part
        if job.ticket is not None:
            job.transfer.recomputed_tokens += prompt_part
            counters.recomputed_tokens += prompt_part
        elif whole:
            counters.prompt_tokens += sequence.num_tokens
            counters.cached_tokens += sequence.num_cached

    def _gained(self, job: Job, tokens: list[SampledToken], finish: Finish | None) -> None:
        if job.ticket is None:
            job.mark("first_token")
        self.state.counters.generated_tokens += len(tokens)
        self.state.outbox.tokens(job, tokens, finish)
        if finish:
            job.mark("last_token")
            self._scheduler.ended(job.sequence)
            self._end(job)

    def _append(self, sequence: Sequence, token_ids: Iterable[int] = ()) -> None:
        """Adds tokens to those known; blocks that have become full are hashed."""
        sequence.token_ids.extend(token_ids)
        self.state.hasher.extend(sequence.block_hashes, sequence.token_ids, sequence.root_hash)

    def _preempted(self, sequence: Sequence) -> None:
        job = self.jobs.pop(sequence.sequence_id)
        self._stop_pull(job)
        self.state.counters.preemptions += 1
        message = f"{self.state.config.name} ran out of KV blocks"
        self._refuse(job, pb.ERROR_CODE_PREEMPTED, message)
        tracing.record(job, self.state.config, error=message)

    def _forget(self, job: Job) -> None:
        pull_id = self._stop_pull(job)
        if pull_id is not None:
            self._quarantine[pull_id] = job.sequence.block_table
            job.sequence.block_table = []
        else:
            self._give_back(job)
        self._scheduler.remove(job.sequence)

    def _stop_pull(self, job: Job) -> str | None:
        """The id of the job's pull where a transfer of it is still under way."""
        pull_id = self._pull_of(job)
        if pull_id is None or self._puller.cancel(pull_id):
            return pull_id
        del self._pulls[pull_id]
        return None

    def _give_back(self, job: Job) -> None:
        """Releases a ticket that no fence released, once its blocks are read no more. Before token
        0 there is no lease yet, and the ticket may still go to another decode worker."""
        if job.lease is not None:
            self.state.ticket_releases.append(job.lease)

    def _pull_of(self, job: Job) -> str | None:
        return next((key for key, pulled in self._pulls.items() if pulled is job), None)

    def _is_pulling(self, job: Job) -> bool:
        return self._pull_of(job) is not None

    def waiting_tickets(self) -> list[tuple[str, bytes]]:
        """(prefill address, ticket id) of every ticket that still needs its lease."""
        return [job.lease for job in self.jobs.values() if job.lease is not None]

    def leases_renewed(self, answer: tuple[set[bytes], set[bytes]], until: float) -> None:
        """Until when tickets are good, monotonic seconds; a lost one fails unless it is read."""
        renewed, lost = answer
        for job in list(self.jobs.values()):
            if job.lease is None:
                continue
            ticket_id = job.lease[1]
            if ticket_id in lost and not self._is_pulling(job):  # a pull's fence will judge
                self._pull_failed(job, "the prefill worker no longer holds the ticket")
            elif ticket_id in renewed:
                job.lease_end = until
                self._puller.renewed(ticket_id, until)

    def next_deadline(self) -> float | None:
        """The first end of a lease or time-out of a pull, monotonic seconds; None: neither."""
        ends = [job.lease_end for job in self.jobs.values() if job.lease_end is not None]
        pull = self._puller.next_deadline()
        return min([*ends, *([pull] if pull is not None else [])], default=None)

    def held(self) -> Iterable[list[int]]:
        """Blocks of sequences and of pulls given up whose transfer is not terminal."""
        return [*self._scheduler.held, *self._quarantine.values()]

    @property
    def idle(self) -> bool:
        """No sequence is left, and no transfer touches a block."""
        return not self.jobs and not self._pulls


def create(config: WorkerConfig, credentials: Credentials | None = None) -> WorkerServer:
    """A worker that decodes, and computes what comes without a ticket; `start` opens and loads."""
    return WorkerServer(config, DecodeRole, credentials)
