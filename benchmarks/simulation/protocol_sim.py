"""The whole hand-off protocol under a seeded scheduler.

Real roles, pools, offers and pulls over a fake transport and a virtual clock; two gateways in
miniature, each with a stream to every worker; workers and gateways that die, pause, drain and come
back as others; messages that are lost, late, doubled or out of order; leases and deadlines that
run out; pools that are too small.

What must hold after every step, whatever happened:
  1. every block of every worker is accounted for: free, cached, or held by its known owners;
  2. a sequence joins on exactly the KV that was offered: same process, block, owner and tokens;
  3. no transfer writes into a block that has a new owner, and no offer is released while read;
  4. no lease, wait, pull or request outlives its deadline by more than a turn of its worker;
  5. a cancel, or the end of a gateway's stream, leaves nothing of it but blocks being written;
  6. a client's tokens are a prefix of the undisturbed run's: none wrong, twice or missing;
  7. a request ends exactly once.
And once the faults stop: every request ends, and then no lease is open and no block is held.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from protocol_gateways import Gateways, Seat, Stream
from protocol_wire import MoodyNetwork, MoodyTransport, RememberingPool, Truth
from roles_kit import BLOCK, HASHER, KEY, Site, Worker

from crossdock.kvtransfer import ticket as tickets
from crossdock.proto.errors import TransferFailed
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.job import Job
from crossdock.worker.loop import Turn

PREFILLS, DECODES = 2, 2
LEASE_S = 30.0


class Violation(AssertionError):
    """An invariant does not hold. The text names the seed, and the seed replays it."""


class Simulation:
    """One seed, one history: `run` raises Violation when an invariant breaks."""

    def __init__(self, seed: int, steps: int = 200, trace: Callable[[str], None] | None = None):
        self.seed, self.steps, self.trace = seed, steps, trace
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.network = MoodyNetwork(rng=self.rng, seen=self._see)
        self.site = Site(self.network, pool_type=RememberingPool, transport_type=MoodyTransport)
        self.site.wall_clock = self.site.clock
        self.truth = Truth(self.network)
        self.workers: list[Worker] = []  # all processes that run, also those given up for lost
        self.met: dict[Worker, dict[bytes, int]] = {}  # by decode worker: peer -> blocks
        self.meeting: list[tuple[Stream, Job]] = []  # decode requests whose peer is being met
        self.after_meeting: list[tuple[Stream, worker_pb2.HandOff]] = []  # for one of those
        self.paused: set[Worker] = set()
        self.calls: list[tuple] = []  # between workers, in no order
        self.counter = 0
        self.touched: dict[Worker, None] = {}
        self.seats: list[Seat] = []
        for i, role in enumerate([Role.PREFILL] * PREFILLS + [Role.DECODE] * DECODES):
            self.seats.append(Seat(f"{role}{i}", role, self._worker(role, f"{role}{i}")))
        self.front = Gateways(self.rng, self.site.clock, self.seats, self._see)
        self.actions = {
            self._turn: 40,
            self._to_worker: 24,
            self.front.hear_any: 20,
            self._network: 12,
            self._call: 8,
            self._advance: 6,
            self.front.new_request: 14,
            self._meet: 3,
            self._renew: 4,
            self.front.client_cancels: 1,
            self._kill: 1,
            self._pause: 1,
            self._resume: 3,
            self._replace: 1,
            self._drain: 0.5,
            self.front.stream_breaks: 1,
            self.front.gateway_dies: 0.5,
            self._peers_forgotten: 0.5,
        }

    # -- the schedule --------------------------------------------------------------------------

    def run(self) -> Simulation:
        actions, weights = list(self.actions), list(self.actions.values())
        try:
            for action in self.rng.choices(actions, weights, k=self.steps):
                self._log(action.__name__)
                action()
                self._check()
            self._settle()
        except AssertionError as error:
            raise Violation(f"seed {self.seed}: {error}") from error
        return self

    def _log(self, what: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.site.clock.now:8.1f} {what}")

    def _see(self, what: str) -> None:
        self.seen[what] += 1
        self._log(f"         {what}")

    def _settle(self) -> None:
        """No more faults: everything must come to its end, by work or by time."""
        self.network.calm = True
        self.network._failures.clear()
        self.network._drops = 0
        self.paused.clear()
        for seat in self.seats:
            seat.worker.role.draining = False  # or a cluster that drains as a whole never ends
        self._log("the faults stop")
        for _ in range(800):
            if not self._settle_once():
                if self._over():
                    break
                self._renew_all()
                ends = [worker.role.next_deadline() for worker in self.workers]
                next_end = min((end for end in ends if end is not None), default=1e9)
                now = self.site.clock.now
                self.site.clock.now = min(max(next_end, now + 0.1), now + LEASE_S / 3)
        for request in self.front.requests:
            assert len(request.ends) == 1, f"a request ended so: {request.ends}"
            whole = request.ends != ["finished"] or request.received == request.expected
            assert whole, "tokens are missing"
        for worker in self.workers:
            role = worker.role
            assert role.idle and not role.leases(), f"{role.state.config.name} still holds work"
            used = role.state.pool.num_used
            assert not used, f"{role.state.config.name} still holds {used} blocks"

    def _settle_once(self) -> bool:
        """All that can happen at this time, once. False: nothing did."""
        moved = self.network.deliver() > 0
        while self.network.deliver_late():
            moved = True
        while self.meeting:
            self._introduced(*self.meeting.pop(0))
            moved = True
        for stream in list(self.front.streams):
            while stream.inbox:
                self._receive(stream)
                moved = True
        for worker in self.workers:
            moved |= self._turn_of(worker)
        while self.calls:
            self._carry_out(self.calls.pop(0))
            moved = True
        for stream in list(self.front.streams):
            while stream.outbox:
                self.front.hear(stream)
                moved = True
        self._check()
        return moved

    def _over(self) -> bool:
        return all(request.ends for request in self.front.requests) and all(
            worker.role.idle for worker in self.workers
        )

    def _check(self) -> None:
        """A worker's bookkeeping changes only when it is called: only then is it looked at."""
        for worker in self.touched:
            worker.check()
        self.touched.clear()

    # -- workers -------------------------------------------------------------------------------

    def _worker(self, role: Role, name: str, address: str = "") -> Worker:
        """A fresh process: its pool, its incarnation and all it knows are new."""
        self.counter += 1
        blocks = self.rng.choice([9, 10, 12, 18])  # the longest sequence fits in each
        worker = self.site.worker(
            role,
            blocks,
            address or f"{name}:{self.counter}",
            name=name,
            max_batch=4,
            max_waiting=self.rng.choice([1, 16]),
            chunk_tokens=self.rng.choice([8, 8, 16, 32]),
            reserve=self.rng.choice(["early", "early", "early", "late"]),
            verify=self.rng.choice(["fence", "fence", "checksum"]),
            lease_s=LEASE_S,
        )
        state = worker.role.state
        worker.transport.pool = state.pool
        self.network.homes[state.incarnation] = state.address
        worker.on_turn = lambda turn: self._made(worker, turn)
        if role is Role.PREFILL:
            self.truth.watch_prefill(worker, lambda: self.workers)
        else:
            self.truth.watch_decode(worker)
            self.met[worker] = {}
        self.workers.append(worker)
        return worker

    def _made(self, worker: Worker, turn: Turn) -> None:
        """What a turn of a worker has for the others."""
        streams = {stream.owner: stream for stream in self.front.streams if stream.worker is worker}
        for owner, outputs in turn.outputs.items():
            for output in outputs:
                if output.HasField("ticket"):
                    self.truth.offered(worker, output.ticket)
                if owner in streams and not streams[owner].ended:
                    streams[owner].outbox.append(output)
        for address, ticket_id in turn.ticket_releases:
            self.truth.called.add(ticket_id)
            self.calls.append(("release", address, [ticket_id]))

    def _turn(self) -> None:
        """Mostly one; now and then a worker gets many done while the others get none."""
        worker = self.rng.choice(self.workers)
        for _ in range(self.rng.choice([1] * 11 + [16])):
            if worker not in self.paused:
                self._turn_of(worker)

    def _turn_of(self, worker: Worker) -> bool:
        worked = worker.loop.turn()
        self.touched[worker] = None
        now, role = self.site.clock.now, worker.role
        for lease in role.leases():
            assert lease.remaining_s > 0, "a lease outlived its end"
        for held in role.jobs.values():
            late = held.deadline_unix_s is not None and held.deadline_unix_s <= now
            assert not late, "a request outlived its deadline"
            waited = held.lease_end is not None and held.lease_end <= now
            assert not waited, "a wait for KV outlived its lease"
        return worked

    def _kill(self) -> None:
        """SIGKILL, and a fresh process under the same name, mostly at the same address."""
        seat = self.rng.choice(self.seats)
        address = seat.worker.role.state.address
        self._die(seat.worker)
        same = self.rng.random() < 0.7
        seat.worker = self._worker(seat.role, seat.name, address if same else "")
        self._see("killed, back at the same address" if same else "killed")

    def _die(self, worker: Worker) -> None:
        self._count(worker)
        self.network.kill(worker.role.state.incarnation)
        self.workers.remove(worker)
        self.paused.discard(worker)
        self.meeting = [
            (stream, job) for stream, job in self.meeting if stream.worker is not worker
        ]
        for stream in [stream for stream in self.front.streams if stream.worker is worker]:
            stream.end(self.rng)
            stream.inbox.clear()

    def _pause(self) -> None:
        """SIGSTOP: nothing is heard of it, while its memory can be read as ever."""
        self.paused.add(self.rng.choice(self.workers))
        self._see("paused")

    def _resume(self) -> None:
        if self.paused:
            paused = [worker for worker in self.workers if worker in self.paused]
            self.paused.discard(self.rng.choice(paused))

    def _replace(self) -> None:
        """A paused worker is given up for lost; later it goes on beside its successor."""
        seats = [seat for seat in self.seats if seat.worker in self.paused]
        if seats and len(self.workers) < len(self.seats) + 2:
            seat = self.rng.choice(seats)
            for stream in [stream for stream in self.front.streams if stream.worker is seat.worker]:
                stream.end(self.rng)
            seat.worker = self._worker(seat.role, seat.name)
            self._see("given up while paused")

    def _drain(self) -> None:
        """Takes nothing new, moves away what it has, and leaves once its streams have ended."""
        seat = self.rng.choice(self.seats)
        seat.worker.role.draining = True
        if self.rng.random() < 0.5:
            seat.worker.role.eject_all(worker_pb2.ERROR_CODE_DRAINING, "draining")
            self._turn_of(seat.worker)
            self._die(seat.worker)
            seat.worker = self._worker(seat.role, seat.name)
            self._see("drained")
        elif self.rng.random() < 0.5:
            seat.worker.role.draining = False

    def _advance(self) -> None:
        self.site.clock.now += self.rng.choice([0.1, 0.1, 1.0, 1.0, 5.0, 12.0, 31.0])

    # -- between workers -----------------------------------------------------------------------

    def _network(self) -> None:
        network, what = self.network, self.rng.random()
        if what < 0.35:
            network.hold()
        elif what < 0.5:
            network.deliver_any()
        elif what < 0.75:
            network.deliver(self.rng.choice([1, 2, None]))
        elif what < 0.85:
            network.deliver_late()
        elif what < 0.92:
            network.fail_next_read()
        else:
            network.drop_next_notification()

    def _renew(self) -> None:
        worker = self.rng.choice([seat.worker for seat in self.seats if seat.role is Role.DECODE])
        if worker not in self.paused:
            self._ask_renewal(worker)

    def _renew_all(self) -> None:
        for worker in self.met:
            if worker in self.workers:
                self._ask_renewal(worker)

    def _ask_renewal(self, worker: Worker) -> None:
        until = self.site.clock.now + LEASE_S
        for address, ticket_id in worker.role.waiting_tickets():
            self.calls.append(("renew", address, [ticket_id], worker, until))

    def _call(self) -> None:
        """One call between workers arrives, or is lost, or arrives and arrives again."""
        if not self.calls:
            return
        index, what = self.rng.randrange(len(self.calls)), self.rng.random()
        call = self.calls[index] if what < 0.1 else self.calls.pop(index)
        if what < 0.9:
            self._carry_out(call)

    def _carry_out(self, call: tuple) -> None:
        what, address, ids, *rest = call
        if what == "answer":
            worker, until = rest
            if worker in self.workers and worker not in self.paused:
                worker.role.leases_renewed(ids, until)
                self.touched[worker] = None
            return
        peer = next((w for w in reversed(self.workers) if w.role.state.address == address), None)
        if peer is None or peer in self.paused:
            return
        self.touched[peer] = None
        if what == "release":
            peer.role.release_tickets(ids)
            return
        held = {lease.ticket_id for lease in peer.role.leases()}
        unknown = set(peer.role.renew_tickets(ids, LEASE_S))
        assert unknown == set(ids) - held, "a lease was renewed that is not open"
        self.calls.append(("answer", "", (set(ids) - unknown, unknown), *rest))

    def _meet(self) -> None:
        if self.meeting:
            met = self.meeting[self.rng.randrange(len(self.meeting))]
            if met[0].worker not in self.paused:
                self.meeting.remove(met)
                self._introduced(*met)

    def _introduced(self, stream: Stream, job: Job) -> None:
        """Worker.service and peers: who signed the ticket, and whether it can be read from."""
        ticket, sequence, worker = job.ticket, job.sequence, stream.worker
        self.touched[worker] = None
        try:
            tickets.validate(
                ticket,
                key=KEY,
                incarnation=ticket.incarnation,
                layout_hash=worker.role.state.layout_hash,
                prompt_hash=HASHER.prompt(
                    sequence.token_ids[: ticket.num_tokens],
                    sequence.block_hashes,
                    sequence.root_hash,
                ),
                num_blocks=self._ensure(worker, ticket),
                block_size=BLOCK,
            )
        except TransferFailed as error:
            self._see("peer not met")
            code = worker_pb2.ERROR_CODE_PULL_FAILED
            failed = worker_pb2.SequenceError(code=code, message=str(error))
            if not stream.ended:
                answer = worker_pb2.SequenceOutput(sequence_id=job.id, error=failed)
                stream.outbox.append(answer)
            return
        worker.role.submit(job)
        for waiting in [w for w in self.after_meeting if w[0] is stream]:
            if waiting[1].sequence_id == job.id:
                self.after_meeting.remove(waiting)
                worker.role.hand_off(waiting[1], waiting[0].owner)

    def _ensure(self, worker: Worker, ticket: worker_pb2.Ticket) -> int:
        """How many blocks the ticket's peer has. Raises TransferFailed."""
        known = self.met[worker]
        if ticket.incarnation not in known:
            address = ticket.prefill_address
            peer = next((w for w in self.workers if w.role.state.address == address), None)
            if peer is None or peer.role.state.incarnation != ticket.incarnation:
                raise TransferFailed(f"{address} is gone or another")
            memory = peer.transport.memory
            worker.transport.add_peer(
                ticket.incarnation, peer.transport.info(), memory.num_blocks, memory.block_bytes
            )
            known[ticket.incarnation] = memory.num_blocks
        return known[ticket.incarnation]

    def _peers_forgotten(self) -> None:
        """The controller's list without some peer: it is met again when a ticket comes."""
        worker = self.rng.choice([seat.worker for seat in self.seats if seat.role is Role.DECODE])
        for incarnation in list(self.met[worker]):
            worker.transport.remove_peer(incarnation)
            del self.met[worker][incarnation]

    # -- the streams, on the worker's side -----------------------------------------------------

    def _to_worker(self) -> None:
        waiting = [s for s in self.front.streams if s.inbox and s.worker not in self.paused]
        if waiting:
            self._receive(self.rng.choice(waiting))

    def _receive(self, stream: Stream) -> None:
        what, sequence_id, load = stream.inbox.popleft()
        role = stream.worker.role
        self.touched[stream.worker] = None
        job = load
        if what == "submit" and job.ticket is not None:
            self.meeting.append((stream, job))
            if self.rng.random() < 0.8 or self.network.calm:
                self._introduced(*self.meeting.pop())
        elif what == "submit":
            role.submit(job)
        elif what == "hand_off":
            if any(s is stream and j.id == sequence_id for s, j in self.meeting):
                self.after_meeting.append((stream, load))  # its request comes first
            else:
                role.hand_off(load, stream.owner)
        elif what == "cancel":
            self.meeting = [
                (s, j) for s, j in self.meeting if s is not stream or j.id != sequence_id
            ]
            role.cancel(sequence_id, "given up", stream.owner)
            left = [lease for lease in role.leases() if lease.sequence_id == sequence_id]
            assert sequence_id not in role.jobs and not left, "a cancel left something behind"
        else:
            self.meeting = [(s, j) for s, j in self.meeting if s is not stream]
            role.owner_gone(stream.owner)
            left = [lease for lease in role.leases() if lease.owner == stream.owner]
            left += [held for held in role.jobs.values() if held.owner == stream.owner]
            assert not left, "a gateway's end left something behind"

    # -- what has been seen --------------------------------------------------------------------

    def tally(self) -> Counter[str]:
        """What happened in this history, to tell that the faults do happen."""
        for worker in self.workers:
            self._count(worker)
        return self.seen

    def _count(self, worker: Worker) -> None:
        role = worker.role
        if role.state.config.role is Role.PREFILL:
            self.seen.update({f"lease {how}": n for how, n in role._offers.exits.items()})
        else:
            counts = role._puller.counts
            self.seen.update({f"pull: {why}": n for why, n in counts.reasons.items()})
            self.seen["joined"] += counts.joined
