"""Defects put into the product on purpose: the simulation must find every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from protocol_sim import Simulation, Violation
from protocol_wire import MoodyNetwork, MoodyTransport

from crossdock.decode.role import DecodeRole
from crossdock.engine import block_tables
from crossdock.engine.block_pool import BlockPool
from crossdock.engine.sequence import Sequence
from crossdock.kvtransfer import pull
from crossdock.kvtransfer.offers import Exit, Offers
from crossdock.kvtransfer.pull import Puller
from crossdock.prefill.role import PrefillRole
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.admission import Admission
from crossdock.router.dispatch.delivery import detokenize
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.handoff import HandOffs
from crossdock.router.dispatch.request import Delta
from crossdock.router.dispatch.sequence import ActiveRequest, SequenceState
from crossdock.router.placement.view import ClusterView
from crossdock.worker.gateways import Gateways
from crossdock.worker.job import Job
from crossdock.worker.outbox import Outbox
from crossdock.worker.role import WorkerRole
from crossdock.worker.streams import GatewayStream

Plant = Callable[[pytest.MonkeyPatch], None]
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


def named_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The blocks of a pull under way are found by others in the prefix cache."""
    start = DecodeRole._start_pull

    def name_and_start(self: DecodeRole, job: Job) -> None:
        start(self, job)
        sequence = job.sequence
        if job.id in self.jobs:
            sealed, computed = sequence.num_sealed, sequence.num_computed
            sequence.num_computed = job.ticket.num_tokens
            block_tables.seal_full(self.state.pool, sequence)
            sequence.num_sealed, sequence.num_computed = sealed, computed

    patch.setattr(DecodeRole, "_start_pull", name_and_start)


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
        lambda self, ids, generations, num_tokens: announce(
            self, ids, [each + 1 for each in generations], num_tokens
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
        if incarnation in self._peers:
            self._peers.add(at_home)
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


def preempted_without_freeing(patch: pytest.MonkeyPatch) -> None:
    preempted = DecodeRole._preempted

    def keep_a_block(self: DecodeRole, sequence: Sequence) -> None:
        self.state.pool.allocate(1)
        preempted(self, sequence)

    patch.setattr(DecodeRole, "_preempted", keep_a_block)


# -- the gateway's streams on a worker -----------------------------------------------------------


def cancel_leaves_the_meeting(patch: pytest.MonkeyPatch) -> None:
    """A sequence is taken on when its peer is met, although it was cancelled meanwhile."""
    receive = Gateways.receive

    def keep(self: Gateways, stream: GatewayStream, frame: pb.GatewayFrame) -> None:
        meetings = dict(stream.meetings)
        receive(self, stream, frame)
        if frame.HasField("cancel"):
            stream.meetings.update(meetings)

    patch.setattr(Gateways, "receive", keep)


def meeting_outlives_its_stream(patch: pytest.MonkeyPatch) -> None:
    ended = Gateways.ended

    def keep(self: Gateways, stream: GatewayStream) -> None:
        meetings = dict(stream.meetings)
        ended(self, stream)
        stream.meetings.update(meetings)

    patch.setattr(Gateways, "ended", keep)


def read_wakes_nobody(patch: pytest.MonkeyPatch) -> None:
    """The end of a read is told only where it is the last."""
    was_read = Puller._was_read

    def silent(self: Puller, *arguments: object, last: bool) -> bool:
        was_read(self, *arguments, last=last)
        return True

    patch.setattr(Puller, "_was_read", silent)


# -- the gateway ---------------------------------------------------------------------------------


def _at_restart(
    patch: pytest.MonkeyPatch, act: Callable[[Dispatcher, SequenceState], None]
) -> None:
    restart = Dispatcher._restart

    def act_and_restart(self: Dispatcher, sequence: SequenceState, *arguments: object) -> None:
        act(self, sequence)
        restart(self, sequence, *arguments)

    patch.setattr(Dispatcher, "_restart", act_and_restart)


def restart_forgets_a_token(patch: pytest.MonkeyPatch) -> None:
    """The last emitted token is drawn, and sent, again."""

    def forget(self: Dispatcher, sequence: SequenceState) -> None:
        if sequence.generated:
            del sequence.token_ids[-1:]

    _at_restart(patch, forget)


def restart_repeats_a_token(patch: pytest.MonkeyPatch) -> None:
    """The last emitted token is in the new attempt's prompt twice."""

    def repeat(self: Dispatcher, sequence: SequenceState) -> None:
        if sequence.generated:
            sequence.token_ids += sequence.token_ids[-1:]

    _at_restart(patch, repeat)


def restart_with_another_seed(patch: pytest.MonkeyPatch) -> None:
    def reseed(self: Dispatcher, sequence: SequenceState) -> None:
        sequence.sampling.seed += 1

    _at_restart(patch, reseed)


def restart_resets_the_detokenizer(patch: pytest.MonkeyPatch) -> None:
    """Bytes of an unfinished character, or the beginning of a stop string, are lost."""

    def reset(self: Dispatcher, sequence: SequenceState) -> None:
        request = sequence.active.request
        sequence.detokenizer = self._detokenizer_of(list(request.prompts[0]), request.sampling.stop)

    _at_restart(patch, reset)


def token_0_delivered_twice(patch: pytest.MonkeyPatch) -> None:
    """By the prefill worker, and by the decode worker that was told of it."""
    joined = Dispatcher._joined

    def deliver_again(
        self: Dispatcher, sequence: SequenceState, transfer: pb.TransferStats
    ) -> None:
        joined(self, sequence, transfer)
        sequence.active.stream.push(Delta(sequence.index, "", sequence.token_ids[-1:]))

    patch.setattr(Dispatcher, "_joined", deliver_again)


def late_output_taken(patch: pytest.MonkeyPatch) -> None:
    """What an attempt that was given up still says is delivered."""
    on_outputs, route = Dispatcher.on_outputs, Dispatcher._route
    attempts: dict[str, SequenceState] = {}

    def note(self: Dispatcher, sequence: SequenceState) -> None:
        route(self, sequence)
        attempts[sequence.sequence_id] = sequence

    def take(self: Dispatcher, link: object, outputs: list[pb.SequenceOutput]) -> None:
        for output in outputs:
            sequence = attempts.get(output.sequence_id)
            given_up = sequence is not None and output.sequence_id not in self._sequences
            if given_up and output.token_ids:
                self._deliver(sequence, detokenize(sequence, output, frozenset()), self._clock())
        on_outputs(self, link, outputs)

    patch.setattr(Dispatcher, "_route", note)
    patch.setattr(Dispatcher, "on_outputs", take)


def ticket_given_to_two_readers(patch: pytest.MonkeyPatch) -> None:
    """At token 0 the ticket goes out again, although somebody has it."""
    complete = HandOffs.complete

    def complete_afresh(self: HandOffs, sequence: SequenceState, now: float) -> None:
        self._view.unplace(sequence.placement.decode, sequence.sequence_id)
        sequence.decode_worker = ""
        sequence.placement = replace(sequence.placement, decode="")
        complete(self, sequence, now)

    patch.setattr(HandOffs, "complete", complete_afresh)


def hand_off_before_token_0(patch: pytest.MonkeyPatch) -> None:
    """The decode worker is told of the whole prompt while it is still being computed."""
    advance = HandOffs.advance

    def advance_all(self: HandOffs, sequence: SequenceState, now: float) -> None:
        if sequence.decode_worker:
            sequence.progress.ready_blocks = len(sequence.progress.ticket.block_ids)
        advance(self, sequence, now)

    patch.setattr(HandOffs, "advance", advance_all)


def holders_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    """The client is gone, and the workers go on."""
    cancel = Dispatcher._cancel_on_holders

    def unless_gone(self: Dispatcher, sequence: SequenceState, why: str) -> None:
        if why != "client gone":
            cancel(self, sequence, why)

    patch.setattr(Dispatcher, "_cancel_on_holders", unless_gone)


def deadline_timer_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    end = Dispatcher._end

    def forget_and_end(self: Dispatcher, active: ActiveRequest, *arguments: object) -> None:
        active.deadline_timer = None
        end(self, active, *arguments)

    patch.setattr(Dispatcher, "_end", forget_and_end)


def deadline_never_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dispatcher, "_deadline_passed", lambda self, active: None)


def waiting_sequence_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A worker appears, and whoever waited for one is not told."""
    patch.setattr(Dispatcher, "on_change", lambda self: None)


def admission_not_given_back(patch: pytest.MonkeyPatch) -> None:
    """A request with several continuations counts as one at its end."""
    release = Admission.release
    patch.setattr(Admission, "release", lambda self, tenant, n: release(self, tenant, 1))


def placement_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClusterView, "unplace", lambda self, name, key: None)


def held_continuation_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The first of n continuations has its token 0, and the others go on waiting for it."""
    patch.setattr(Dispatcher, "_release_held", lambda self, sequence: None)


def lost_worker_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """A stream that the gateway gave up keeps its sequences."""
    patch.setattr(Dispatcher, "on_lost", lambda self, link, reason: None)


PLANTS: list[Plant] = [
    no_fence,
    fence_read_before_the_blocks,
    generation_never_raised,
    generation_raised_after_reuse,
    named_before_the_fence,
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
    cancel_leaves_the_meeting,
    meeting_outlives_its_stream,
    read_wakes_nobody,
    restart_forgets_a_token,
    restart_repeats_a_token,
    restart_with_another_seed,
    restart_resets_the_detokenizer,
    token_0_delivered_twice,
    late_output_taken,
    ticket_given_to_two_readers,
    hand_off_before_token_0,
    holders_not_cancelled,
    deadline_timer_not_cancelled,
    deadline_never_noticed,
    waiting_sequence_forgotten,
    admission_not_given_back,
    placement_not_taken_back,
    held_continuation_forgotten,
    lost_worker_not_noticed,
]
