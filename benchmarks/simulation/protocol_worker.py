"""What stands around a worker's role in a history: the post to its engine, its gateways' streams,
its peers, and the calls between workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from roles_kit import CONTEXT, HASHER, VOCAB, Worker

from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.errors import TransferFailed
from crossdock.proto.types import WorkerEndpoint
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.gateways import Gateways
from crossdock.worker.loop import EngineLoop, Turn
from crossdock.worker.peers import Met, Peers, Renewed
from crossdock.worker.role import WorkerRole


class StrictLoop(EngineLoop):
    """A command that fails is a defect here."""

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()


@dataclass(eq=False)
class Call:
    """From one worker to another; or its answer, on the way back."""

    caller: Host
    address: str
    ask: Callable[[WorkerRole], object]
    done: Callable[[object], None]
    answer: object = None
    over: list[bool] = field(default_factory=list)  # one entry once it was answered


class Calls:
    """All calls under way, in no order. One may be lost, or arrive twice."""

    def __init__(
        self,
        rng: random.Random,
        resident: Callable[[str], Worker | None],
        computing: Callable[[], set[bytes]],
    ) -> None:
        """`computing`: the tickets whose prompts are still being computed."""
        self.rng, self.resident, self.computing = rng, resident, computing
        self.calm = False
        self.prompt = rng.choice([0.8, 0.3])  # meetings that happen at once
        self.under_way: list[Call] = []
        self.meetings: list[tuple[Host, bytes, Callable[[], None]]] = []
        self.released: set[bytes] = set()  # ticket ids that a Release call was made for

    def forget(self, host: Host) -> None:
        """It is gone, and nobody is there to be answered."""
        self.under_way = [call for call in self.under_way if call.caller is not host]
        self.meetings = [meeting for meeting in self.meetings if meeting[0] is not host]

    def any(self) -> None:
        if self.under_way:
            index, what = self.rng.randrange(len(self.under_way)), self.rng.random()
            call = self.under_way[index] if what < 0.1 else self.under_way.pop(index)
            if what < 0.9:
                self.arrives(call)
            else:
                self._answer(call, TransferFailed("lost"))

    def take_all(self) -> list[Call]:
        taken, self.under_way = self.under_way, []
        return taken

    def arrives(self, call: Call) -> None:
        if call.answer is not None:
            self._answer(call, call.answer)
            return
        peer = self.resident(call.address)
        if peer is None:
            self._answer(call, TransferFailed(f"{call.address} does not answer"))
            return

        def at_peer(role: WorkerRole) -> None:
            answer = Call(call.caller, "", call.ask, call.done, call.ask(role), call.over)
            self.under_way.append(answer)

        peer.host.post(at_peer)

    def _answer(self, call: Call, answer: object) -> None:
        if not call.over and call.caller.alive:
            call.over.append(True)
            call.done(answer)

    def meet_any(self) -> None:
        if self.meetings:
            self.meetings.pop(self.rng.randrange(len(self.meetings)))[2]()


class Phone:
    """See worker.peers.PeerCalls."""

    def __init__(self, host: Host, calls: Calls) -> None:
        self._host, self._calls = host, calls

    def introduce(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        meet = partial(self._meet, incarnation, address, done)
        self._calls.meetings.append((self._host, incarnation, meet))
        if self._calls.calm or self._calls.rng.random() < self._calls.prompt:
            self._calls.meetings.pop()[2]()

    def _meet(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        peer = self._calls.resident(address)
        if peer is None or peer.role.state.incarnation != incarnation:
            self._host.see("peer not met")
            done(TransferFailed(f"{address} is gone or another"))
            return
        told = peer.host.description
        transport = self._host.worker.transport
        transport.add_peer(incarnation, told.transport_info, told.num_blocks, told.block_bytes)
        done(told)

    def forget(self, incarnation: bytes) -> None:
        gone = (self._host, incarnation)
        self._calls.meetings = [each for each in self._calls.meetings if each[:2] != gone]
        self._host.worker.transport.remove_peer(incarnation)

    def renew(
        self, address: str, ids: list[bytes], lease_s: float, done: Callable[[Renewed], None]
    ) -> None:
        def ask(role: WorkerRole) -> worker_pb2.RenewLeasesResponse:
            held = {lease.ticket_id for lease in role.leases()}
            unknown = role.renew_tickets(ids, lease_s)
            assert set(unknown) == set(ids) - held, "a lease was renewed that is not open"
            return worker_pb2.RenewLeasesResponse(unknown_ticket_ids=unknown)

        self._calls.under_way.append(Call(self._host, address, ask, done))  # type: ignore[arg-type]

    def release(self, address: str, ids: list[bytes]) -> None:
        def ask(role: WorkerRole) -> worker_pb2.ReleaseTicketsResponse:
            role.release_tickets(ids)
            return worker_pb2.ReleaseTicketsResponse()

        early = self._calls.computing() & set(ids) if ids else None
        assert not early, "a ticket was released before its lease began"
        self._calls.released.update(ids)
        self._calls.under_way.append(Call(self._host, address, ask, lambda answer: None))


class Host:
    """What Gateways asks of a WorkerServer."""

    vocab_size = VOCAB
    hasher = HASHER

    def __init__(
        self, worker: Worker, calls: Calls, see: Callable[[str], None], says_room: bool
    ) -> None:
        """`says_room`: gateways learn how much it takes at once, and keep the rest back."""
        state = worker.role.state
        self.worker, self.see = worker, see
        self.alive = True
        self.config = state.config
        self.description = worker_pb2.WorkerDescription(
            name=state.config.name,
            role=ROLE_TO_PB[state.config.role],
            incarnation=state.incarnation,
            layout=worker_pb2.KVLayout(block_size=state.config.block_size),
            layout_hash=state.layout_hash,
            context_length=CONTEXT,
            max_batch=state.config.max_batch if says_room else 0,
            chunk_tokens=state.config.chunk_tokens if says_room else 0,
            num_blocks=state.memory.num_blocks,
            block_bytes=state.memory.block_bytes,
            transport_info=worker.transport.info(),
            address=state.address,
        )
        self.public_description = worker_pb2.WorkerDescription()
        self.public_description.CopyFrom(self.description)
        self.public_description.ClearField("transport_info")
        self.peers = Peers(Phone(self, calls), state.clock)
        self.gateways = Gateways(self, state.clock)
        self._worked = True  # in its last turn
        self._told = 0  # turns that had something for others

    @property
    def endpoint(self) -> WorkerEndpoint:
        state, config = self.worker.role.state, self.config
        return WorkerEndpoint(
            config.name, "pool", config.role, state.address, state.incarnation.hex()
        )

    def post(self, command: Callable[[WorkerRole], None]) -> None:
        role = self.worker.role
        self.worker.loop.post(lambda: command(role))

    def post_snapshot(
        self,
        deliver: Callable[[worker_pb2.WorkerFrame], None],
        hello: worker_pb2.WorkerDescription | None = None,
    ) -> None:
        loop = self.worker.loop
        loop.post(lambda: deliver(loop.snapshot(hello)))

    def publish(self, turn: Turn) -> None:
        self._told += 1
        self.gateways.publish(turn)
        self.peers.release(turn.ticket_releases)

    def beat(self) -> None:
        self.gateways.publish(Turn(load=self.worker.role.load()))

    def renew(self) -> None:
        tickets = self.worker.role.waiting_tickets()
        self.peers.renew(tickets, self.config.lease_s, self._renewed)

    def _renewed(self, kept: set[bytes], lost: set[bytes], until: float) -> None:
        self.post(lambda role: role.leases_renewed((kept, lost), until))

    # -- the engine thread ---------------------------------------------------------------------

    @property
    def awake(self) -> bool:
        """Whether the engine thread has a reason to turn over, as worker.loop has it."""
        role, loop = self.worker.role, self.worker.loop
        if self._worked or loop._wakeup.is_set():
            return True
        deadline, now = role.next_deadline(), role.state.clock()
        if deadline is not None and deadline <= now:
            return True
        # A request's own deadline waits for the next turn, at most IDLE_WAIT_S.
        ends = (job.deadline_unix_s for job in role.jobs.values())
        return any(end is not None and end <= now for end in ends)

    def turn(self, slept: bool = False) -> bool:
        """One turn. From an engine that `slept` nothing may come of it."""
        told, posted = self._told, self.worker.transport.posted
        self.worker.loop._wakeup.clear()
        self._worked = self.worker.loop.turn()
        moved = self._worked or self._told > told or self.worker.transport.posted > posted
        assert not (slept and moved), f"{self.config.name} slept though there was something to do"
        return moved
