"""One sequence on one worker, with all that the engine itself need not know."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from crossdock.kvcache.sequence import Sequence
from crossdock.proto import events
from crossdock.proto.convert import sampling_from_pb
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.hashing import HASH_BYTES, BlockHasher
from crossdock.proto.steps import Yields
from crossdock.proto.v1 import worker_pb2 as pb


@dataclass(eq=False)
class Job:
    """Owned by the gateway whose stream brought it; ends with that stream at the latest."""

    sequence: Sequence
    owner: str
    traceparent: str = ""
    deadline_unix_s: float | None = None
    progress: pb.PromptProgress = field(default_factory=pb.PromptProgress)
    lease_end: float | None = None  # monotonic seconds; until then a ticket not released is good
    times: dict[str, float] = field(default_factory=dict)  # life-cycle event -> wall-clock ms
    transfer: pb.TransferStats = field(default_factory=pb.TransferStats)
    first_output_sent: bool = False
    number: int = 0  # its gateway's name for it, where that gave it one

    @property
    def id(self) -> str:
        """The sequence's id, unique in the cluster; a restart of a request has another."""
        return self.sequence.sequence_id

    @property
    def ticket(self) -> pb.Ticket | None:
        """Of the KV that it offers or reads; None: neither, or not yet."""
        return self.progress.ticket if self.progress.HasField("ticket") else None

    @property
    def ready(self) -> bool:
        """The prompt of the ticket is computed, and token 0 is known."""
        blocks = len(self.progress.ticket.block_ids)
        return self.ticket is not None and self.progress.ready_blocks >= blocks

    @property
    def lease(self) -> tuple[str, bytes] | None:
        """Prefill address and id of a ticket that is read here, from token 0 to its release."""
        ticket = self.ticket
        if ticket is None or not self.ready or self.lease_end is None:
            return None
        return ticket.prefill_address, ticket.ticket_id

    def mark(self, event: str, unix_s: float | None = None) -> None:
        """Notes when a life-cycle event happened first; `unix_s`: one that was emitted then."""
        if event not in self.times:
            self.times[event] = 1000 * (time.time() if unix_s is None else unix_s)
            if unix_s is None:
                events.emit(event, self.id, self.ticket.ticket_id.hex() if self.ticket else "-")

    @classmethod
    def from_pb(
        cls,
        request: pb.SequenceRequest,
        owner: str,
        *,
        arrival: float,
        vocab_size: int,
        context_length: int,
        hasher: BlockHasher,
    ) -> Job:
        """arrival: now, in unix seconds; where the request came to its gateway before, that counts.

        Raises InvalidRequest for what a gateway should never have let through."""
        ids = list(request.token_ids)
        if not ids:
            raise InvalidRequest("token_ids", ids, "must hold at least one token")
        if len(ids) >= context_length:
            limit = f"fewer than {context_length} tokens fit this worker"
            raise InvalidRequest("token_ids", f"{len(ids)} tokens", limit)
        if not (min(ids) >= 0 and max(ids) < vocab_size):
            worst = next(i for i in ids if not 0 <= i < vocab_size)
            raise InvalidRequest("token_ids", worst, f"must be from 0 to {vocab_size - 1}")
        hashes, size = list(request.block_hashes), hasher.block_size
        if len(hashes) > len(ids) // size or any(
            len(each) != HASH_BYTES for each in (request.root_hash, *hashes)
        ):
            limit = f"a root and one for each full block of {size} tokens, {HASH_BYTES} bytes each"
            raise InvalidRequest("block_hashes", f"{len(hashes)} hashes", limit)
        hasher.extend(hashes, ids, request.root_hash)
        sampling = sampling_from_pb(request.sampling)
        sampling.validate(vocab_size)
        sequence = Sequence(
            sequence_id=request.sequence_id,
            token_ids=ids,
            prompt_tokens=request.prompt_tokens or len(ids),
            sampling=sampling,
            eos_token_ids=frozenset(request.eos_token_ids),
            block_hashes=hashes,
            root_hash=request.root_hash,
            num_scored=request.scored_tokens,
            priority=request.priority,
            yields=min(max(request.yields, Yields.NOT), Yields.LATE),
            arrival=min(request.arrival_unix_s or arrival, arrival),
        )
        deadline = request.deadline_unix_ms / 1000 if request.deadline_unix_ms else None
        return cls(sequence, owner, request.traceparent, deadline, number=request.number)
