"""A network with moods, pools that remember every owner, and what is true of each hand-off.

Nothing here asks the code under test what it believes: epochs are counted beside the generations,
and a read notes whose block it read, at which epoch, when it is carried out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from fake_transport import FakeNetwork, FakeTransport
from roles_kit import Worker, kv_of_tokens

from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Sequence as Continuation
from crossdock.kvtransfer.transport import Handle, HandleState
from crossdock.proto.v1 import worker_pb2

Source = tuple[bytes, int, int]  # incarnation, block id, epoch


class RememberingPool(BlockPool):
    """Counts the owners of each block by itself, whatever becomes of the generations."""

    def __init__(self, num_blocks: int, block_size: int, generations: np.ndarray) -> None:
        super().__init__(num_blocks, block_size, generations)
        self.epochs = [0] * num_blocks

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        blocks = super().allocate(n, after)
        for block in blocks:
            self.epochs[block] += 1
        return blocks


@dataclass
class MoodyNetwork(FakeNetwork):
    """Reads of different peers overtake each other; notifications come late, twice, or never."""

    rng: random.Random = field(default_factory=random.Random)
    calm: bool = False
    late: list[tuple[FakeTransport, bytes]] = field(default_factory=list)
    notified: set[bytes] = field(default_factory=set)  # ticket ids that a reader released
    homes: dict[bytes, str] = field(default_factory=dict)  # incarnation -> address
    seen: Callable[[str], None] = lambda what: None

    def deliver_any(self) -> None:
        """One message, maybe ahead of older ones."""
        if self._queue:
            self._carry_out(self._queue.pop(self.rng.randrange(len(self._queue))))

    def deliver_late(self) -> bool:
        if not self.late:
            return False
        receiver, ticket_id = self.late.pop(self.rng.randrange(len(self.late)))
        FakeTransport.receive(receiver, ticket_id)
        return True


class MoodyTransport(FakeTransport):
    """Notes what each read brought, and that nobody else owns a block that is written."""

    pool: RememberingPool
    _reading: tuple[Sequence[int], Sequence[int]] | None = None

    def __init__(self, network: MoodyNetwork, *arguments: object) -> None:
        super().__init__(network, *arguments)  # type: ignore[arg-type]
        self.network = network
        self.came_from: dict[int, Source] = {}  # local block -> what was read into it last
        self.posted = 0  # reads, of blocks and of generations

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        self._reading = list(remote_ids), list(local_ids)
        return super().read_blocks(incarnation, remote_ids, local_ids)

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        self.network.notified.add(notify)
        return super().read_generations(incarnation, remote_ids, notify)

    def receive(self, ticket_id: bytes) -> None:
        mood = 0.0 if self.network.calm else self.network.rng.random()
        if mood < 0.7:
            super().receive(ticket_id)
        if mood >= 0.6:
            self.network.late.append((self, ticket_id))
            self.network.seen("notification twice" if mood < 0.7 else "notification late")

    def _post(
        self, incarnation: bytes, handle: Handle, act: Callable[[FakeTransport], None]
    ) -> Handle:
        self.posted += 1
        reading, self._reading = self._reading, None
        if reading is None:
            return super()._post(incarnation, handle, act)
        remote, local = reading
        reserved = [self.pool.epochs[block] for block in local]

        def noted(peer: FakeTransport) -> None:
            assert isinstance(peer, MoodyTransport)
            now = [self.pool.epochs[block] for block in local]
            assert now == reserved, "a transfer wrote into a block that has a new owner"
            act(peer)
            if handle.state is HandleState.DONE:
                for here, there in zip(local, remote, strict=True):
                    self.came_from[here] = (peer._incarnation, there, peer.pool.epochs[there])

        return super()._post(incarnation, handle, noted)


class Truth:
    """Every offer as it was made, and every join held against it."""

    def __init__(self, network: MoodyNetwork, called: set[bytes]) -> None:
        """`called`: ticket ids that a Release call was made for."""
        self._network = network
        self._offered: dict[bytes, list[Source]] = {}
        self.called = called

    def watch_prefill(self, worker: Worker, workers: Callable[[], list[Worker]]) -> None:
        offers = worker.role._offers
        release = offers.release

        def checked(ticket_ids: Sequence[bytes]) -> int:
            still_open = {lease.ticket_id for lease in offers.open()}
            for ticket_id in still_open.intersection(ticket_ids):
                asked = ticket_id in self._network.notified or ticket_id in self.called
                assert asked, "an offer was released that no reader has released"
                assert not any(_reads(reader, ticket_id) for reader in workers()), (
                    "an offer was released while its blocks are being read"
                )
            return release(ticket_ids)

        offers.release = checked

    def watch_decode(self, worker: Worker) -> None:
        scheduler, jobs = worker.role._scheduler, worker.role.jobs
        join = scheduler.join

        def checked(sequence: Continuation) -> None:
            ticket = jobs[sequence.sequence_id].ticket
            assert ticket is not None
            self._check_join(worker, sequence, ticket)
            join(sequence)

        scheduler.join = checked

    def offered(self, worker: Worker, ticket: worker_pb2.Ticket) -> None:
        """Called in the turn that made the ticket."""
        epochs = worker.role.state.pool.epochs
        self._offered[ticket.ticket_id] = [
            (ticket.incarnation, block, epochs[block]) for block in ticket.block_ids
        ]

    def _check_join(
        self, worker: Worker, sequence: Continuation, ticket: worker_pb2.Ticket
    ) -> None:
        offered = self._offered[ticket.ticket_id]
        came_from = worker.transport.came_from
        for index in range(sequence.num_sealed, len(offered)):
            read = came_from.get(sequence.block_table[index])
            assert read == offered[index], (
                f"joined on KV of {_say(read)}, offered was {_say(offered[index])}"
            )
        kv = worker.runner.kv_of(sequence.block_table)[: ticket.num_tokens]
        right = kv_of_tokens(sequence.token_ids[: ticket.num_tokens])
        assert np.array_equal(kv, right), "joined on KV of other tokens"


def _say(source: Source | None) -> str:
    if source is None:
        return "nowhere"
    return f"block {source[1]}, owner {source[2]}, of process {source[0].hex()[:8]}"


def _reads(worker: Worker, ticket_id: bytes) -> bool:
    """Whether a read of the ticket's blocks is under way or still to come there."""
    puller = getattr(worker.role, "_puller", None)
    if puller is None:
        return False
    for pull in puller._pulls.values():
        if not pull.complete:
            continue  # it failed, or will: the ticket went to another worker
        if pull.ticket.ticket_id == ticket_id and pull.fence is None:
            return pull.read is not None or pull.stopped is None
    return False
