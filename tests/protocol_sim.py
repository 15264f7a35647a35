"""The whole hand-off protocol under a seeded scheduler.

Real roles, pools, offers and pulls over the fake transport and a virtual clock; a gateway in
miniature; messages that come late; processes that die and come back as others; leases that run
out; pools that are too small.

What must hold after every step, whatever happened:
  1. every block of every worker is accounted for;
  2. a client's tokens are a prefix of the undisturbed run's: none wrong, none twice, none missing;
  3. a request ends exactly once.
And once the faults stop: every request ends, and then nothing is held anywhere.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from roles_kit import Site, Worker, job, undisturbed

from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2, worker_pb2

PREFILLS, DECODES = 2, 2
MAX_REQUESTS = 12


@dataclass(eq=False)
class Request:
    prompt: list[int]
    expected: list[int]
    emitted: list[int] = field(default_factory=list)
    attempt: str = ""  # sequence id of the running attempt
    cancelled: bool = False
    ends: int = 0


@dataclass(eq=False)
class Seat:
    """A place in the cluster: one worker after another, and the gateway's stream to it."""

    name: str
    role: Role
    worker: Worker
    inbox: deque = field(default_factory=deque)  # gateway -> worker: (method, arguments)
    outbox: deque = field(default_factory=deque)  # worker -> gateway: outputs


class Simulation:
    """One seed, one history: `run` raises AssertionError with the seed when something is wrong."""

    def __init__(self, seed: int, steps: int = 250) -> None:
        self.seed, self.steps = seed, steps
        self.rng = random.Random(seed)
        self.site = Site()
        self.faults = True
        self.requests: list[Request] = []
        self.attempts: dict[str, Request] = {}
        self.holders: dict[str, list[Seat]] = {}
        self.counter = 0
        roles = [Role.PREFILL] * PREFILLS + [Role.DECODE] * DECODES
        self.seats = [Seat(f"{role}{i}", role, self._worker(role)) for i, role in enumerate(roles)]
        self._introduce_all()

    # -- the schedule --------------------------------------------------------------------------

    def run(self) -> None:
        try:
            for _ in range(self.steps):
                self._step()
                self._check()
            self._settle()
        except Exception as error:
            raise AssertionError(f"seed {self.seed}: {type(error).__name__}: {error}") from error

    def _step(self) -> None:
        actions = {
            self._turn: 40,
            self._deliver_to_worker: 20,
            self._deliver_to_gateway: 20,
            self._network: 12,
            self._advance: 8,
            self._new_request: 8,
            self._renew: 3,
            self._release_calls: 3,
            self._client_cancels: 1,
            self._kill: 1,
            self._gateway_stream_breaks: 1,
        }
        self.rng.choices(list(actions), list(actions.values()))[0]()

    def _settle(self) -> None:
        """No more faults: everything must come to its end, by work or by time."""
        self.faults = False
        for _ in range(600):
            self.site.network.deliver()
            for seat in self.seats:
                while seat.inbox:
                    self._pop_inbox(seat)
                self._turn_of(seat)
                while seat.outbox:
                    self._output(seat, seat.outbox.popleft())
            self._release_calls()
            self._check()
            if all(request.ends for request in self.requests) and self._quiet():
                break
            self.site.clock.now += 0.5
        for request in self.requests:
            assert request.ends == 1, f"a request ended {request.ends} times"
            assert request.cancelled or request.emitted == request.expected, "tokens are missing"
        for seat in self.seats:
            pool = seat.worker.role.state.pool
            assert seat.worker.role.idle, f"{seat.name} still holds work"
            assert pool.num_used == 0, f"{seat.name} still holds {pool.num_used} blocks"

    def _quiet(self) -> bool:
        return all(
            seat.worker.role.idle and not seat.inbox and not seat.outbox for seat in self.seats
        )

    def _check(self) -> None:
        for seat in self.seats:
            seat.worker.check()

    # -- workers -------------------------------------------------------------------------------

    def _worker(self, role: Role) -> Worker:
        blocks = self.rng.choice([9, 12, 40])  # the longest sequence fits in each
        return self.site.worker(role, blocks=blocks, max_batch=4, pull_timeout_s=10.0)

    def _introduce_all(self) -> None:
        self.site.introduce(*(seat.worker for seat in self.seats))

    def _turn(self) -> None:
        self._turn_of(self.rng.choice(self.seats))

    def _turn_of(self, seat: Seat) -> None:
        seat.worker.turn()
        seat.outbox.extend(seat.worker.take())

    def _kill(self) -> None:
        """SIGKILL, noticed by the gateway at once, and a fresh process in its place."""
        seat = self.rng.choice(self.seats)
        self.site.network.kill(seat.worker.role.state.incarnation)
        seat.worker = self._worker(seat.role)
        self._introduce_all()
        self._stream_lost(seat)

    def _gateway_stream_breaks(self) -> None:
        seat = self.rng.choice(self.seats)
        seat.worker.role.owner_gone("gateway")
        self._stream_lost(seat)

    def _stream_lost(self, seat: Seat) -> None:
        seat.inbox.clear()
        seat.outbox.clear()
        lost = [attempt for attempt, seats in self.holders.items() if seat in seats]
        for attempt in lost:
            self.holders[attempt].remove(seat)
            request = self.attempts[attempt]
            # Once decode has the ticket, losing the prefill worker is the pull's business.
            if seat.role is Role.DECODE or not self.holders[attempt]:
                self._restart(request)

    # -- messages ------------------------------------------------------------------------------

    def _deliver_to_worker(self) -> None:
        seat = self.rng.choice(self.seats)
        if seat.inbox:
            self._pop_inbox(seat)

    def _pop_inbox(self, seat: Seat) -> None:
        method, arguments = seat.inbox.popleft()
        getattr(seat.worker.role, method)(*arguments)

    def _deliver_to_gateway(self) -> None:
        seat = self.rng.choice(self.seats)
        if seat.outbox:
            self._output(seat, seat.outbox.popleft())

    def _network(self) -> None:
        network = self.site.network
        what = self.rng.random()
        if what < 0.4:
            network.hold()
        elif what < 0.8:
            network.deliver(self.rng.choice([1, 2, None]))
        elif what < 0.9:
            network.fail_next_read()
        else:
            network.drop_next_notification()

    def _advance(self) -> None:
        self.site.clock.now += self.rng.choice([0.1, 1.0, 5.0, 12.0, 31.0])

    def _renew(self) -> None:
        """One decode worker's renewal round; some calls are not answered."""
        seat = self.rng.choice([seat for seat in self.seats if seat.role is Role.DECODE])
        renewed: set[bytes] = set()
        lost: set[bytes] = set()
        for address, ticket_id in seat.worker.role.waiting_tickets():
            peer = self._at(address)
            if peer is None or self.rng.random() < 0.2:
                continue
            unknown = peer.worker.role.renew_tickets([ticket_id], 30.0)
            (lost if unknown else renewed).add(ticket_id)
        seat.worker.role.leases_renewed((renewed, lost), self.site.clock.now + 30.0)

    def _release_calls(self) -> None:
        for seat in self.seats:
            releases, seat.worker.releases = seat.worker.releases, []
            for address, ticket_id in releases:
                peer = self._at(address)
                if peer is not None and not (self.faults and self.rng.random() < 0.3):
                    peer.worker.role.release_tickets([ticket_id])

    def _at(self, address: str) -> Seat | None:
        for seat in self.seats:
            if seat.worker.role.state.address == address:
                return seat
        return None

    # -- the gateway ---------------------------------------------------------------------------

    def _new_request(self) -> None:
        if len(self.requests) >= MAX_REQUESTS:
            return
        shared = [11] * self.rng.choice([0, 8, 16])  # prefixes that caches can share
        prompt = shared + [self.rng.randrange(3, 900) for _ in range(self.rng.randrange(1, 40))]
        tokens = self.rng.randrange(1, 12)
        request = Request(prompt, undisturbed(prompt, tokens))
        self.requests.append(request)
        self._start(request)

    def _start(self, request: Request) -> None:
        self.counter += 1
        request.attempt = f"a{self.counter}"
        self.attempts[request.attempt] = request
        seat = self.rng.choice([seat for seat in self.seats if seat.role is Role.PREFILL])
        self.holders[request.attempt] = [seat]
        seat.inbox.append(("submit", (self._job(request, None),)))

    def _job(self, request: Request, ticket: worker_pb2.Ticket | None):
        return job(
            request.prompt,
            emitted=request.emitted,
            ticket=ticket,
            sequence_id=request.attempt,
            max_tokens=len(request.expected),
        )

    def _restart(self, request: Request) -> None:
        """Prefills prompt and emitted tokens elsewhere; the client's stream goes on."""
        self._let_go(request)
        if not request.ends:
            self._start(request)

    def _let_go(self, request: Request) -> None:
        attempt = request.attempt
        self.attempts.pop(attempt, None)
        for seat in self.holders.pop(attempt, []):
            seat.inbox.append(("cancel", (attempt, "given up")))

    def _client_cancels(self) -> None:
        running = [request for request in self.requests if not request.ends]
        if running:
            request = self.rng.choice(running)
            request.cancelled = True
            request.ends += 1
            self._let_go(request)

    def _output(self, seat: Seat, output: worker_pb2.SequenceOutput) -> None:
        request = self.attempts.get(output.sequence_id)
        if request is None or seat not in self.holders[output.sequence_id]:
            return  # of an attempt that was given up
        if output.HasField("error"):
            self.holders[output.sequence_id].remove(seat)
            self._restart(request)
            return
        if seat.role is Role.DECODE:
            self.holders[output.sequence_id] = [seat]  # the prefill worker has let go
        request.emitted += output.token_ids
        so_far = request.expected[: len(request.emitted)]
        assert request.emitted == so_far, f"wrong tokens: {request.emitted}, not {so_far}"
        if output.finish_reason == inference_pb2.FINISH_REASON_LENGTH:
            request.ends += 1
            self.holders[output.sequence_id].remove(seat)
            self._let_go(request)
        elif output.HasField("ticket"):
            decode = self.rng.choice([seat for seat in self.seats if seat.role is Role.DECODE])
            self.holders[output.sequence_id].append(decode)
            decode.inbox.append(("submit", (self._job(request, output.ticket),)))
