"""Gateways in miniature, as router.dispatch has them: each owns its requests to their ends.

    submit to a prefill worker ──token 0, ticket──> submit to a decode worker ──> finished
              ^       └──sealed blocks──> a decode worker reads along ──^   │
              └───────────────────────── restart ───────────────────────────┘

Their streams to the workers keep their order and break at any message.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from roles_kit import Worker, job, undisturbed

from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2, worker_pb2
from crossdock.worker.job import Job

GATEWAYS = 2
MAX_REQUESTS = 16
LOST = None  # the last thing a gateway hears of a stream
RESTARTED = {
    worker_pb2.ERROR_CODE_PREEMPTED,
    worker_pb2.ERROR_CODE_OVERLOADED,
    worker_pb2.ERROR_CODE_DRAINING,
    worker_pb2.ERROR_CODE_PULL_FAILED,
}


@dataclass(eq=False)
class Gateway:
    """One life of one gateway."""

    name: str
    streams: dict[Seat, Stream] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)  # by sequence id


@dataclass(eq=False)
class Request:
    prompt: list[int]
    expected: list[int]
    gateway: Gateway
    deadline: float | None
    received: list[int] = field(default_factory=list)  # by the client
    emitted: list[int] = field(default_factory=list)  # as the gateway remembers
    ends: list[str] = field(default_factory=list)
    attempt: Attempt | None = None


@dataclass(eq=False)
class Attempt:
    id: str
    request: Request
    holders: list[Stream]
    reading_on: Stream | None = None  # a decode worker, while the prompt is computed
    decoding_on: Stream | None = None
    ticket: worker_pb2.Ticket | None = None
    dropped: bool = False  # whoever read along fell out; token 0 finds another
    lost: Seat | None = None  # of a reader whose stream broke: it may still have the sequence


@dataclass(eq=False)
class Seat:
    """A place in the cluster, held by one worker after another under one name."""

    name: str
    role: Role
    worker: Worker


@dataclass(eq=False)
class Stream:
    """One gateway's stream to one worker. What is sent after its end goes nowhere."""

    owner: str
    gateway: Gateway
    worker: Worker
    seat: Seat
    inbox: deque = field(default_factory=deque)  # to the worker: (what, sequence id, load)
    outbox: deque = field(default_factory=deque)  # to the gateway: SequenceOutput | LOST
    ended: bool = False

    def send(self, what: str, sequence_id: str, load: object = None) -> None:
        """`load`: the Job of a submit, the HandOff of a hand_off."""
        if not self.ended:
            self.inbox.append((what, sequence_id, load))

    def end(self, rng: random.Random) -> None:
        """Each side still hears a part of what was under way, then learns that it is over."""
        if self.ended:
            return
        self.ended = True
        for box in (self.inbox, self.outbox):
            for _ in range(rng.randrange(len(box) + 1)):
                box.pop()
        self.inbox.append(("gone", "", None))
        self.outbox.append(LOST)


class Gateways:
    """All gateways of one history, their clients and their streams."""

    def __init__(
        self,
        rng: random.Random,
        clock: Callable[[], float],
        seats: Sequence[Seat],
        see: Callable[[str], None],
    ) -> None:
        self._rng, self._clock, self._seats, self._see = rng, clock, seats, see
        self._counter = 0
        self.streams: list[Stream] = []
        self.requests: list[Request] = []
        self.gateways = [self._gateway(f"gateway{i}") for i in range(GATEWAYS)]

    def _gateway(self, name: str) -> Gateway:
        gateway = Gateway(name)
        for seat in self._seats:
            self._connect(gateway, seat)
        return gateway

    def _connect(self, gateway: Gateway, seat: Seat) -> None:
        self._counter += 1
        stream = Stream(f"{gateway.name}/{self._counter}", gateway, seat.worker, seat)
        gateway.streams[seat] = stream
        self.streams.append(stream)

    def stream_breaks(self) -> None:
        stream = self._rng.choice(self.streams)
        stream.end(self._rng)
        self._see("stream broken")

    def gateway_dies(self) -> None:
        """All its streams end at once; its requests are the clients' to repeat."""
        index = self._rng.randrange(GATEWAYS)
        dead = self.gateways[index]
        for stream in dead.streams.values():
            stream.end(self._rng)
            stream.outbox.clear()
        for request in self.requests:
            if request.gateway is dead and not request.ends:
                request.ends.append("gateway lost")
        dead.attempts.clear()
        self.gateways[index] = self._gateway(dead.name)
        self._see("gateway lost")

    def new_request(self) -> None:
        if len(self.requests) >= MAX_REQUESTS:
            return
        rng = self._rng
        shared = [11] * rng.choice([0, 8, 16])  # prefixes that caches can share
        prompt = shared + [rng.randrange(3, 900) for _ in range(rng.randrange(1, 40))]
        tokens = 72 - len(prompt) if rng.random() < 0.2 else rng.randrange(1, 16)
        expected = undisturbed(prompt, tokens)
        deadline = self._clock() + rng.choice([5.0, 40.0]) if rng.random() < 0.2 else None
        request = Request(prompt, expected, rng.choice(self.gateways), deadline)
        self.requests.append(request)
        self.start(request)

    def start(self, request: Request) -> None:
        """On a prefill worker, or, where the router would bypass the hand-off, on a decode one."""
        role = Role.DECODE if self._rng.random() < 0.2 else Role.PREFILL
        stream = self._choose(request.gateway, role)
        self._counter += 1
        attempt = Attempt(f"a{self._counter}", request, [stream])
        if role is Role.DECODE:
            attempt.decoding_on = stream
            self._see("no hand-off")
        request.attempt = attempt
        request.gateway.attempts[attempt.id] = attempt
        stream.send("submit", attempt.id, self._job(stream, attempt))

    def _choose(self, gateway: Gateway, role: Role) -> Stream:
        return gateway.streams[
            self._rng.choice([seat for seat in self._seats if seat.role is role])
        ]

    def _job(self, stream: Stream, attempt: Attempt, sealed: int | None = None) -> Job:
        request = attempt.request
        return job(
            request.prompt,
            emitted=request.emitted,
            ticket=attempt.ticket,
            sealed=sealed,
            owner=stream.owner,
            sequence_id=attempt.id,
            deadline_unix_ms=int(1000 * (request.deadline or 0)),
            max_tokens=len(request.expected),
        )

    def _end(self, request: Request, how: str) -> None:
        """The one way out of a request: frees what is left of it on the workers."""
        request.ends.append(how)
        self._see(how)
        self.give_up(request)

    def give_up(self, request: Request) -> None:
        attempt, request.attempt = request.attempt, None
        if attempt is not None:
            del request.gateway.attempts[attempt.id]
            for stream in attempt.holders:
                stream.send("cancel", attempt.id)

    def restart(self, request: Request) -> None:
        """Prompt and emitted tokens are prefilled elsewhere; the client's stream goes on."""
        self.give_up(request)
        self._see("restarted")
        self.start(request)

    def client_cancels(self) -> None:
        running = [request for request in self.requests if not request.ends]
        if running:
            self._end(self._rng.choice(running), "cancelled")

    def hear_any(self) -> None:
        waiting = [stream for stream in self.streams if stream.outbox]
        if waiting:
            self.hear(self._rng.choice(waiting))

    def hear(self, stream: Stream) -> None:
        output = stream.outbox.popleft()
        gateway = stream.gateway
        if output is not LOST:
            attempt = gateway.attempts.get(output.sequence_id)
            if attempt is not None and stream in attempt.holders:
                self._take(attempt, stream, output)
            return
        if gateway not in self.gateways:
            return
        self._connect(gateway, stream.seat)
        for attempt in [a for a in gateway.attempts.values() if stream in a.holders]:
            attempt.holders.remove(stream)
            # Once a decode worker has the ticket, losing the other one is the pull's business.
            if attempt.reading_on is stream:
                attempt.lost = stream.seat
                self._fell_out(attempt)
            elif attempt.decoding_on in (None, stream):
                self.restart(attempt.request)

    def _take(self, attempt: Attempt, stream: Stream, output: worker_pb2.SequenceOutput) -> None:
        request = attempt.request
        judged = attempt.decoding_on in (None, stream)
        if output.HasField("error"):
            attempt.holders.remove(stream)
            code = output.error.code
            self._see(worker_pb2.ErrorCode.Name(code))
            if attempt.reading_on is stream and code in RESTARTED:
                self._fell_out(attempt)
            elif judged and code == worker_pb2.ERROR_CODE_DEADLINE:
                assert request.deadline <= self._clock(), "ended before its deadline"
                self._end(request, "deadline")
            elif judged:
                assert code in RESTARTED, f"a worker failed: {output.error.message}"
                self.restart(request)
            return
        assert judged, "a prefill worker goes on after its ticket was passed on"
        if output.HasField("ticket"):
            attempt.ticket = output.ticket
        if not output.token_ids:
            self._read_along(attempt, output)
            return
        request.received += output.token_ids
        request.emitted += output.token_ids
        so_far = request.expected[: len(request.received)]
        assert request.received == so_far, f"wrong tokens: {request.received}, not {so_far}"
        if attempt.decoding_on is stream:
            attempt.holders = [stream]  # the prefill worker has let go
        if output.finish_reason == inference_pb2.FINISH_REASON_LENGTH:
            attempt.holders.remove(stream)
            self._end(request, "finished")
        elif attempt.decoding_on is None:
            self._hand_off(attempt, output)

    def _read_along(self, attempt: Attempt, output: worker_pb2.SequenceOutput) -> None:
        """Some blocks are sealed: a decode worker may have them while the others are computed."""
        sealed = output.sealed_blocks
        if attempt.reading_on is not None:
            progress = worker_pb2.HandOff(sequence_id=attempt.id, sealed_blocks=sealed)
            attempt.reading_on.send("hand_off", attempt.id, progress)
        elif not attempt.dropped:
            attempt.reading_on = reader = self._choose(attempt.request.gateway, Role.DECODE)
            attempt.holders.append(reader)
            reader.send("submit", attempt.id, self._job(reader, attempt, sealed))
            self._see("read along")

    def _hand_off(self, attempt: Attempt, output: worker_pb2.SequenceOutput) -> None:
        assert attempt.ticket is not None, "token 0 without a ticket"
        assert output.sealed_blocks == len(attempt.ticket.block_ids), "token 0 before its blocks"
        if attempt.reading_on is not None:
            attempt.decoding_on, attempt.reading_on = attempt.reading_on, None
            progress = worker_pb2.HandOff(
                sequence_id=attempt.id,
                sealed_blocks=output.sealed_blocks,
                first_tokens=output.token_ids,
                checksums=output.checksums,
            )
            attempt.decoding_on.send("hand_off", attempt.id, progress)
            return
        decode = self._choose(attempt.request.gateway, Role.DECODE)
        if decode.seat is attempt.lost:
            self.restart(attempt.request)  # under another id
            return
        attempt.decoding_on = decode
        attempt.holders.append(decode)
        made = self._job(decode, attempt)
        made.checksums = tuple(output.checksums)
        decode.send("submit", attempt.id, made)

    def _fell_out(self, attempt: Attempt) -> None:
        """Whoever read along is lost, or will not have it: another gets the ticket at token 0."""
        attempt.reading_on, attempt.dropped = None, True
        self._see("reader fell out")
