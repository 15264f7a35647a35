"""Defects put into the product on purpose: the simulation must find every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from protocol_plants_gateway import GATEWAY_PLANTS, Plant
from protocol_sim import Simulation, Violation
from protocol_wire import MoodyNetwork, MoodyTransport

from crossdock.decode.role import DecodeRole
from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import SampledToken, Sequence
from crossdock.kvtransfer import pull
from crossdock.kvtransfer.offers import Exit, Offers
from crossdock.kvtransfer.pull import Puller
from crossdock.prefill.role import PrefillRole
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.job import Job
from crossdock.worker.outbox import Outbox
from crossdock.worker.role import WorkerRole

LIMIT = 2000  # seeds


def find(plant: Plant, limit: int = LIMIT) -> Violation | None:
    """The first violation in seeds 0 to limit - 1. Any other exception is no find and is raised."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        for seed in range(limit):
            try:
                Simulation(seed).run()
            except Violation as violation:
                return violation
    return None


# -- the fence and the generations ---------------------------------------------------------------


def no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pull, "_compare", lambda *_: None)


def fence_read_before_the_blocks(patch: pytest.MonkeyPatch) -> None:
    """The generations are those of the time when the read was posted."""
    begin = Puller._begin_reads

    def note(self: Puller) -> None:
        begin(self)
        for each in self._pulls.values():
            peer = self._transport._network.transports.get(each.ticket.incarnation)
            if peer is not None and not hasattr(each, "early"):
                each.early = peer.memory.generations[each.remote_ids].copy()
                ticket = each.ticket
                each.expected = np.array(ticket.generations, dtype=np.int64)[each.places]

    def compare(each: object, handle: object) -> str | None:
        same = (each.early == each.expected).all()
        return None if same else "fence refused"

    patch.setattr(Puller, "_begin_reads", note)
    patch.setattr(pull, "_compare", compare)


def generation_never_raised(patch: pytest.MonkeyPatch) -> None:
    _raise_generations(patch, lambda pool, blocks: None)


def generation_raised_after_reuse(patch: pytest.MonkeyPatch) -> None:
    """A block's generation is raised once its new owner has filled it, not before it gets it."""
    behind: dict[BlockPool, list[int]] = {}

    def raise_the_last(pool: BlockPool, blocks: list[int]) -> None:
        for block in behind.get(pool, []):
            pool.generations[block] += 1
        behind[pool] = blocks

    _raise_generations(patch, raise_the_last)


def _raise_generations(
    patch: pytest.MonkeyPatch, how: Callable[[BlockPool, list[int]], None]
) -> None:
    allocate = BlockPool.allocate

    def allocate_otherwise(self: BlockPool, n: int, after: int | None = None) -> list[int]:
        before = self.generations.copy()
        blocks = allocate(self, n, after)
        self.generations[:] = before
        how(self, blocks)
        return blocks

    patch.setattr(BlockPool, "allocate", allocate_otherwise)


def cached_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The blocks of a pull under way are found by others in the prefix cache."""
    start = DecodeRole._start_pull

    def seal_and_start(self: DecodeRole, job: Job) -> None:
        start(self, job)
        sequence = job.sequence
        if job.id in self.jobs:
            sealed, computed = sequence.num_sealed, sequence.num_computed
            sequence.num_computed = job.ticket.num_tokens
            block_tables.seal_full(self.state.pool, sequence)
            sequence.num_sealed, sequence.num_computed = sealed, computed

    patch.setattr(DecodeRole, "_start_pull", seal_and_start)


# -- the prompt that is still being computed -----------------------------------------------------


def announced_before_it_is_computed(patch: pytest.MonkeyPatch) -> None:
    tell = Outbox.progress

    def tell_more(self: Outbox, job: Job, progress: pb.PromptProgress) -> None:
        progress.ready_blocks += 1
        tell(self, job, progress)

    patch.setattr(Outbox, "progress", tell_more)


def fenced_before_the_last_part(patch: pytest.MonkeyPatch) -> None:
    """The fence follows the first part that was read, and the sequence joins."""
    patch.setattr(pull._Pull, "complete", property(lambda self: True))


def released_while_it_is_computed(patch: pytest.MonkeyPatch) -> None:
    """An early reservation given back releases the ticket, which then goes to another."""

    def always(self: DecodeRole, job: Job) -> None:
        if job.ticket is not None:
            release = job.ticket.prefill_address, job.ticket.ticket_id
            self.state.ticket_releases.append(release)

    patch.setattr(DecodeRole, "_give_back", always)


def announced_with_the_generations_to_come(patch: pytest.MonkeyPatch) -> None:
    """The ticket is signed for whoever owns the blocks next."""
    announce = Offers.announce
    patch.setattr(
        Offers,
        "announce",
        lambda self, ids, generations, *rest: announce(
            self, ids, [each + 1 for each in generations], *rest
        ),
    )


# -- who may read, and for how long --------------------------------------------------------------


def peer_keyed_by_address(patch: pytest.MonkeyPatch) -> None:
    """Whoever lives at the address of a dead peer is taken for it."""
    post = MoodyTransport._post

    def resident(network: MoodyNetwork, incarnation: bytes) -> bytes:
        alive = [name for name in network.transports if name in network.homes]
        home = network.homes[incarnation]
        return next((name for name in alive if network.homes[name] == home), incarnation)

    def post_by_address(
        self: MoodyTransport, incarnation: bytes, handle: object, act: object
    ) -> object:
        at_home = resident(self.network, incarnation)
        if (packed := self._peers.get(incarnation)) is not None:
            self._peers[at_home] = packed
        return post(self, at_home, handle, act)

    patch.setattr(MoodyTransport, "_post", post_by_address)


def reaper_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Offers, "reap", lambda self: [])


def unknown_ticket_renewed(patch: pytest.MonkeyPatch) -> None:
    renew = Offers.renew
    patch.setattr(Offers, "renew", lambda self, ids, lease_s: renew(self, ids, lease_s) and [])


def lease_end_ignored_while_waiting(patch: pytest.MonkeyPatch) -> None:
    """A request whose ticket has run out goes on waiting for blocks."""
    patch.setattr(DecodeRole, "_is_pulling", lambda self, job: True)


def offered_but_not_pinned(patch: pytest.MonkeyPatch) -> None:
    offer = PrefillRole._offer

    def offer_and_free(self: PrefillRole, job: Job, token: object) -> None:
        offer(self, job, token)
        self._offers.release([self._offers.open()[-1].ticket_id])

    patch.setattr(PrefillRole, "_offer", offer_and_free)


def released_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The release notification is sent as the read is posted."""
    begin = Puller._begin_reads

    def begin_and_release(self: Puller) -> None:
        reserved = [each for each in self._pulls.values() if each.read is None]
        begin(self)
        for each in reserved:
            if each.read is not None:
                ticket = each.ticket
                self._transport.read_generations(ticket.incarnation, [], ticket.ticket_id)

    patch.setattr(Puller, "_begin_reads", begin_and_release)


def released_twice(patch: pytest.MonkeyPatch) -> None:
    """A second release of a ticket gives its blocks back once more."""
    leave = Offers._leave
    left: dict[bytes, list[int]] = {}

    def leave_and_remember(self: Offers, ticket_id: bytes, how: Exit) -> None:
        left[ticket_id] = list(self._leases[ticket_id].block_ids)
        leave(self, ticket_id, how)

    def release(self: Offers, ticket_ids: Iterable[bytes]) -> int:
        for ticket_id in ticket_ids:
            if ticket_id in self._leases:
                self._leave(ticket_id, Exit.RELEASED)
            elif ticket_id in left:
                self._on_free(left[ticket_id])
        return 0

    patch.setattr(Offers, "_leave", leave_and_remember)
    patch.setattr(Offers, "release", release)


# -- blocks that somebody forgets, or forgets too early ------------------------------------------


def quarantine_skipped(patch: pytest.MonkeyPatch) -> None:
    """Blocks are used again while a read still writes into them."""
    forget = DecodeRole._forget

    def forget_at_once(self: DecodeRole, job: Job) -> None:
        forget(self, job)
        for pull_id, blocks in self._quarantine.items():
            self.state.pool.release(blocks)
            self._quarantine[pull_id] = []

    patch.setattr(DecodeRole, "_forget", forget_at_once)


def preempted_in_mid_read(patch: pytest.MonkeyPatch) -> None:
    """A sequence reserved early gives its blocks to others while a read still writes into them."""
    preempted = DecodeRole._preempted

    def forget(self: DecodeRole, sequence: Sequence) -> None:
        pull_id = self._pull_of(self.jobs[sequence.sequence_id])
        preempted(self, sequence)
        if pull_id is not None and self._pulls.pop(pull_id, None):
            del self._puller._pulls[pull_id]

    def preemptible(self: Puller) -> list[str]:
        return [key for key, p in self._pulls.items() if not (p.complete or p.stopped)]

    patch.setattr(DecodeRole, "_preempted", forget)
    patch.setattr(Puller, "preemptible", preemptible)


def quarantine_never_left(patch: pytest.MonkeyPatch) -> None:
    """The blocks of a pull that was given up are forgotten."""
    ended = DecodeRole._pull_ended

    def forget(self: DecodeRole, done: object) -> None:
        if done.pull_id in self._quarantine:
            self._quarantine[done.pull_id] = []
        ended(self, done)

    patch.setattr(DecodeRole, "_pull_ended", forget)


def cancel_leaves_the_offer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefillRole, "cancel", WorkerRole.cancel)


def gateway_end_leaves_the_offers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefillRole, "owner_gone", WorkerRole.owner_gone)


def scored_from_the_prefix_cache(patch: pytest.MonkeyPatch) -> None:
    """KV that was found has no logits, and what it would have scored is left out."""
    patch.setattr(Sequence, "reusable", property(lambda self: self.num_tokens - 1))


def token_drawn_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """A token is drawn although none is asked for."""
    patch.setattr(Sequence, "draws", True)


def unasked_blocks_kept(patch: pytest.MonkeyPatch) -> None:
    """A block of a prompt after which nothing is drawn is forgotten."""
    first_tokens = PrefillRole._first_tokens

    def keep(self: PrefillRole, job: Job, drawn: list[SampledToken]) -> None:
        first_tokens(self, job, drawn)
        if not drawn:
            self.state.pool.allocate(1)

    patch.setattr(PrefillRole, "_first_tokens", keep)


def preempted_without_freeing(patch: pytest.MonkeyPatch) -> None:
    preempted = DecodeRole._preempted

    def keep_a_block(self: DecodeRole, sequence: Sequence) -> None:
        self.state.pool.allocate(1)
        preempted(self, sequence)

    patch.setattr(DecodeRole, "_preempted", keep_a_block)


PLANTS: list[Plant] = [
    no_fence,
    fence_read_before_the_blocks,
    generation_never_raised,
    generation_raised_after_reuse,
    cached_before_the_fence,
    announced_before_it_is_computed,
    fenced_before_the_last_part,
    released_while_it_is_computed,
    announced_with_the_generations_to_come,
    peer_keyed_by_address,
    reaper_off,
    unknown_ticket_renewed,
    lease_end_ignored_while_waiting,
    offered_but_not_pinned,
    released_before_the_fence,
    released_twice,
    quarantine_skipped,
    preempted_in_mid_read,
    quarantine_never_left,
    cancel_leaves_the_offer,
    gateway_end_leaves_the_offers,
    preempted_without_freeing,
    scored_from_the_prefix_cache,
    token_drawn_for_nothing,
    unasked_blocks_kept,
    *GATEWAY_PLANTS,
]
