"""The whole hand-off protocol under a seeded scheduler.

The product's own classes from the client's stream to the KV blocks: dispatchers with their links
and views, the workers' halves of the streams, peers, engine loops, roles, pools, offers and pulls,
on a fake transport and a virtual clock. The schedule draws what happens next: workers and gateways
that die, pause, drain and come back as others; messages that are lost, late, doubled or out of
order; leases and deadlines that run out; pools that are too small.

What must hold after every step, whatever happened:
  1. every block of every worker is accounted for: free, cached, or held by its known owners;
  2. a sequence joins on exactly the KV that was offered: same process, block, owner and tokens;
  3. no transfer writes into a block that has a new owner, and no offer is released while read;
  4. no lease, wait, pull or request outlives its deadline by more than a turn of its worker;
  5. a cancel, or the end of a gateway's stream, leaves nothing of it but blocks being written;
  6. a client's tokens and text are a prefix of the undisturbed run's: none wrong, twice or missing;
     so are the scores of its prompt, each position's once, and nothing is drawn for max_tokens 0;
  7. a request ends exactly once;
  8. an engine that sleeps has nothing to do: whatever gives it work wakes it;
  9. what a gateway keeps (links, placements, admission, timers) is of sequences under way, none of
     them waits for a worker that is there, and no ticket has two readers.
And once the faults stop: every request ends, and then nothing is held anywhere.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable

from protocol_front import GONE, HELLO, SOME, Front, Stream
from protocol_schemes import blocks_reused, slow_reads, welcome
from protocol_settle import LEASE_S, settle, settle_now
from protocol_wire import MoodyNetwork, MoodyTransport, RememberingPool, Truth
from protocol_worker import Calls, Host, StrictLoop
from roles_kit import Site, Worker

from crossdock.decode.role import DecodeRole
from crossdock.kvtransfer.pull import PullDone
from crossdock.prefill.role import PrefillRole
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.loop import Turn

STEPS = 28  # of a history, faults on


class Seat:
    """A place in the cluster, held by one worker after another under one name."""

    def __init__(self, name: str, role: Role) -> None:
        self.name, self.role = name, role
        self.worker: Worker


class Violation(AssertionError):
    """An invariant does not hold. The text names the seed, and the seed replays it."""


class Simulation:
    """One seed, one history: `run` raises Violation when an invariant breaks."""

    def __init__(self, seed: int, steps: int = STEPS, trace: Callable[[str], None] | None = None):
        self.seed, self.steps, self.trace = seed, steps, trace
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.network = MoodyNetwork(rng=self.rng, seen=self._see)
        self.site = Site(
            self.network,
            pool_type=RememberingPool,
            transport_type=MoodyTransport,
            tokens_per_step=self.rng.choice([1, 2, 4]),
        )
        self.site.wall_clock = self.clock = self.site.clock
        self.calls = Calls(self.rng, self._resident, self._computing)
        self.truth = Truth(self.network, self.calls.released)
        self.workers: list[Worker] = []  # all processes that run, also those given up for lost
        self.paused: dict[Worker, None] = {}
        self.counter = 0
        self.fine = self.rng.random() < 0.5  # small steps, and more of them
        # Long answers, little room for them, and gateways that send all the same.
        self.tight = self.rng.random() < 0.3
        self.touched: dict[Worker, None] = {}
        roles = [Role.PREFILL] * self.rng.choice([1, 2])
        roles += [Role.DECODE] * self.rng.choice([1, 2])
        roles += [Role.COLOCATED] * (self.rng.random() < 0.3)
        self.seats = [Seat(f"{role}{i}", role) for i, role in enumerate(roles)]
        for seat in self.seats:
            seat.worker = self._worker(seat.role, seat.name)
        scoring = seed % 4 == 2
        self.front = Front(self.rng, self.clock, self._see, self._resident, self.tight, scoring)
        self._members()
        self.actions = {
            self._sweep: 0 if self.fine else 80,
            self._turn: 20,
            self._to_worker: 12,
            self.front.hear_any: 10,
            self._network: self.rng.choice([6, 12, 24]),
            self.calls.any: 5,
            self._advance: self.rng.choice([4, 8, 16]),
            self.front.new_request: 25,
            self.front.dial_any: 5,
            self.front.membership: 3,
            self.calls.meet_any: 3,
            self._renew: 4,
            self._beat: 2,
            self.front.client_leaves: 1,
            self._slow_reads: 8 if self.tight else 3,
            self._blocks_reused: 3,
            self.kill: self.rng.choice([0.5, 1, 4]),
            self._pause: self.rng.choice([1, 6]),
            self._resume: self.rng.choice([2, 8]),
            self._replace: 1,
            self._drain: 0.5,
            self.front.stream_breaks: self.rng.choice([0.5, 6]),
            self.front.gateway_dies: 0.5,
            self.front.silence: 0.5,
            self._peers_forgotten: self.rng.choice([0.5, 4]),
        }

    # -- the schedule --------------------------------------------------------------------------

    def run(self) -> Simulation:
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # a history is full of what a cluster would warn of
        try:
            self._begin()
            actions, weights = list(self.actions), list(self.actions.values())
            for action in self.rng.choices(
                actions, weights, k=self.steps * 3 if self.fine else self.steps
            ):
                self.log(action.__name__)
                action()
                self.check()
            settle(self)
        except AssertionError as error:
            raise Violation(f"seed {self.seed}: {error}") from error
        finally:
            logging.disable(disabled)
        return self

    def log(self, what: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.clock.now:8.2f} {what}")

    def _see(self, what: str) -> None:
        self.seen[what] += 1
        self.log(f"         {what}")

    def _begin(self) -> None:
        """Everybody is connected before anything happens."""
        self.calls.calm = True
        for gateway in self.front.gateways:
            self.front.tell(gateway)
        settle_now(self)
        self.calls.calm = False

    def check(self) -> None:
        """Bookkeeping changes only when somebody is called: only then is it looked at."""
        for worker in self.touched:
            worker.check()
        self.touched.clear()
        if self.rng.random() < 0.5:
            self.front.fire_due()
        self.front.check()

    # -- workers -------------------------------------------------------------------------------

    def _worker(self, role: Role, name: str, address: str = "") -> Worker:
        """A fresh process: its pool, its incarnation and all it knows are new."""
        self.counter += 1
        # Each pool holds the longest sequence, and the tight ones little else.
        blocks = self.rng.choice([9, 9, 10] if self.tight else [10, 12, 18])
        worker = self.site.worker(
            role,
            blocks,
            address or f"{name}:{self.counter}",
            name=name,
            max_batch=self.rng.choice([1, 2, 4, 4]),
            max_waiting=self.rng.choice([1, 16]),
            chunk_tokens=8 if self.tight else self.rng.choice([8, 16, 32]),
            reserve=self.rng.choice(["early", "early", "early", "late"]),
            verify=self.rng.choice(["fence", "fence", "checksum"]),
            lease_s=LEASE_S,
        )
        state = worker.role.state
        worker.transport.pool = state.pool
        self.network.homes[state.incarnation] = state.address
        worker.host = Host(worker, self.calls, self._see, not self.tight)
        worker.loop = StrictLoop(worker.role, worker.runner, lambda turn: self._made(worker, turn))
        worker.transport.set_wakeup(worker.loop.wake)
        self._watch(worker)
        if role is Role.PREFILL:
            self.truth.watch_prefill(worker, lambda: self.workers)
        elif role is Role.DECODE:
            self.truth.watch_decode(worker)
        if role is not Role.PREFILL:
            self._watch_pulls(worker.role)
        self.workers.append(worker)
        self.touched[worker] = None
        return worker

    def _watch_pulls(self, role: DecodeRole) -> None:
        ended = role._pull_ended

        def counted(done: PullDone) -> None:
            why = done.error and done.error.split(":", 1)[0]
            self.seen[f"pull: {why}" if why else "joined"] += 1
            ended(done)

        role._pull_ended = counted

    def _watch(self, worker: Worker) -> None:
        """What a cancel, or the end of a stream, must leave behind: nothing."""
        role = worker.role
        cancel, owner_gone = role.cancel, role.owner_gone

        def cancelled(sequence_id: str, reason: str, owner: str) -> None:
            cancel(sequence_id, reason, owner)
            left = [lease for lease in role.leases() if lease.sequence_id == sequence_id]
            left += [role.jobs[sequence_id]] if sequence_id in role.jobs else []
            assert not [held for held in left if held.owner == owner], (
                "a cancel left something behind"
            )

        def gone(owner: str) -> None:
            owner_gone(owner)
            left = [lease for lease in role.leases() if lease.owner == owner]
            left += [held for held in role.jobs.values() if held.owner == owner]
            assert not left, "a gateway's end left something behind"

        role.cancel, role.owner_gone = cancelled, gone

    def _made(self, worker: Worker, turn: Turn) -> None:
        """What a turn of a worker has for the others."""
        for outputs in turn.outputs.values():
            for output in outputs:
                if output.progress.HasField("ticket"):
                    self.truth.offered(worker, output.progress.ticket)
        worker.host.publish(turn)

    def _resident(self, address: str) -> Worker | None:
        """Who answers there: nobody while it is paused."""
        for worker in reversed(self.workers):
            if worker.role.state.address == address:
                return None if worker in self.paused else worker
        return None

    def _computing(self) -> set[bytes]:
        prefills = [worker for worker in self.workers if isinstance(worker.role, PrefillRole)]
        jobs = [job for worker in prefills for job in worker.role.jobs.values()]
        return {job.ticket.ticket_id for job in jobs if job.ticket is not None}

    def _members(self) -> None:
        self.front.members = [seat.worker.host.endpoint for seat in self.seats]
        self.front.version += 1

    def _slow_reads(self) -> None:
        slow_reads(self)

    def _blocks_reused(self) -> None:
        blocks_reused(self)

    def _sweep(self) -> None:
        """Much of what can happen does, for some; a history would else be over before it began."""
        part, turns = self.rng.choice([0.4, 0.7, 0.9]), self.rng.choice([1, 2, 8])
        for stream in list(self.front.streams):
            if stream.inbox and stream.worker not in self.paused and self.rng.random() < part:
                while stream.inbox:
                    self.receive(stream)
        for worker in list(self.workers):
            if worker not in self.paused and self.rng.random() < part and worker.host.awake:
                for _ in range(turns):
                    if not self.turn_of(worker):
                        break
        for stream in self.front.audible():
            if self.rng.random() < part:
                while stream.audible:
                    self.front.hear(stream)

    def _turn(self) -> None:
        """Mostly one; now and then a worker gets many done while the others get none."""
        able = [worker for worker in self.workers if worker not in self.paused]
        awake = [worker for worker in able if worker.host.awake]
        if awake and self.rng.random() < 0.95:
            worker = self.rng.choice(awake)
            for _ in range(self.rng.choice([1] * 11 + [16])):
                if not self.turn_of(worker):
                    break
        elif able:
            worker = self.rng.choice(able)
            self.turn_of(worker, slept=worker not in awake)

    def turn_of(self, worker: Worker, slept: bool = False) -> bool:
        moved = worker.host.turn(slept)
        if moved:
            self.touched[worker] = None
        now, role = self.clock.now, worker.role
        for lease in role.leases():
            assert lease.remaining_s > 0, "a lease outlived its end"
        for held in role.jobs.values():
            late = held.deadline_unix_s is not None and held.deadline_unix_s <= now
            assert not late, "a request outlived its deadline"
            waited = held.lease_end is not None and held.lease_end <= now
            assert not waited, "a wait for KV outlived its lease"
        return moved

    def kill(self, seat: Seat | None = None, same: bool | None = None) -> None:
        """SIGKILL, and a fresh process under the same name, mostly at the same address."""
        seat = seat or self.rng.choice(self.seats)
        address = seat.worker.role.state.address
        self._die(seat.worker)
        same = self.rng.random() < 0.7 if same is None else same
        seat.worker = self._worker(seat.role, seat.name, address if same else "")
        self._members()
        if self.rng.random() < 0.7:
            welcome(self, seat.worker)
        self._see("killed, back at the same address" if same else "killed")

    def _die(self, worker: Worker) -> None:
        self._count(worker)
        worker.host.alive = False
        self.network.kill(worker.role.state.incarnation)
        self.calls.forget(worker.host)
        self.workers.remove(worker)
        self.paused.pop(worker, None)
        for stream in [stream for stream in self.front.streams if stream.worker is worker]:
            stream.end()
            stream.inbox.clear()

    def _pause(self) -> None:
        """SIGSTOP: nothing is heard of it, while its memory can be read as ever."""
        self.paused[self.rng.choice(self.workers)] = None
        self._see("paused")

    def _resume(self) -> None:
        if self.paused:
            self.paused.pop(self.rng.choice(list(self.paused)))

    def _replace(self) -> None:
        """A paused worker is given up for lost; later it goes on beside its successor."""
        seats = [seat for seat in self.seats if seat.worker in self.paused]
        if seats and len(self.workers) < len(self.seats) + 2:
            seat = self.rng.choice(seats)
            for stream in [stream for stream in self.front.streams if stream.worker is seat.worker]:
                stream.end()
            seat.worker = self._worker(seat.role, seat.name)
            self._members()
            self._see("given up while paused")

    def _drain(self) -> None:
        """Takes nothing new, moves away what it has, and leaves once its streams have ended."""
        seat = self.rng.choice(self.seats)
        worker = seat.worker
        worker.host.post(lambda role: setattr(role, "draining", True))
        if self.rng.random() < 0.5:
            code = worker_pb2.ERROR_CODE_DRAINING
            worker.host.post(lambda role: role.eject_all(code, "draining"))
            self.turn_of(worker)
            self._die(worker)
            seat.worker = self._worker(seat.role, seat.name)
            self._members()
            self._see("drained")
        elif self.rng.random() < 0.5:
            worker.host.post(lambda role: setattr(role, "draining", False))

    def _advance(self) -> None:
        self.advance(self.rng.choice([0.05, 0.1, 0.1, 1.0, 1.0, 5.0, 12.0, 31.0, 90.0]))

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.front.fire_due(everybody=True)

    # -- between workers -----------------------------------------------------------------------

    def _network(self) -> None:
        network, what = self.network, self.rng.random()
        if what < 0.4:
            network.hold()
        elif what < 0.6:
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
            worker.host.renew()

    def _beat(self) -> None:
        for worker in self.workers:
            if worker not in self.paused:
                worker.host.beat()

    def _peers_forgotten(self) -> None:
        """The controller's list without some peer: it is met again when a ticket comes."""
        worker = self.rng.choice([seat.worker for seat in self.seats if seat.role is Role.DECODE])
        known = self.rng.choice([0, 1, len(self.front.members) - 1])
        others = self.rng.sample(self.front.members, known)
        if worker not in self.paused:
            worker.host.peers.update(others)

    # -- the streams, on the worker's side -----------------------------------------------------

    def _to_worker(self) -> None:
        waiting = [s for s in self.front.streams if s.inbox and s.worker not in self.paused]
        if waiting:
            stream = self.rng.choice(waiting)
            for _ in range(min(len(stream.inbox), self.rng.choice(SOME))):
                self.receive(stream)

    def receive(self, stream: Stream) -> None:
        frame = stream.inbox.popleft()
        gateways = stream.worker.host.gateways
        if frame is HELLO:
            stream.side = gateways.open(stream.wire.gateway.name, stream.wake)
        elif frame is GONE:
            if stream.side is not None:
                gateways.ended(stream.side)
        elif stream.side is not None:
            gateways.receive(stream.side, frame)

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
