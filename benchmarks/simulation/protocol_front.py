"""The gateways' side of a history: the product's dispatcher, links and view on a virtual clock.

What stands in for the world is here: wires that break at any message, and the controller's lists
of members.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from protocol_clients import Client, Ticks, VirtualTimers, detokenizer
from roles_kit import BLOCK, HASHER, Clock, Worker

from crossdock.proto.types import Role, SamplingParams, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.admission import Limits
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.links import Links, LinkSettings, WorkerLink
from crossdock.router.dispatch.request import Request
from crossdock.router.dispatch.sequence import Phase
from crossdock.router.dispatch.traffic import TrafficCount
from crossdock.router.placement.policy import Policies
from crossdock.router.placement.view import ClusterView
from crossdock.worker.streams import GatewayStream

LONGEST = 69  # tokens of a sequence: with what a step may draw, 9 blocks
SOME = [1, 1, 2, 3]  # messages that arrive together
TWO_THIRDS_OURS = ["predicted_latency", "predicted_latency", "round_robin"]
LINKS = LinkSettings(silence_s=1.0, tick_s=0.5)
HELLO = pb.GatewayFrame()  # to open a stream with; what it says is the link's
GONE = LOST = None  # the last thing a worker, or a gateway, hears of a stream


# -- wires -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Stream:
    """One stream of a wire, until each side has heard its end."""

    wire: Wire
    worker: Worker
    rng: random.Random
    inbox: deque = field(default_factory=deque)  # GatewayFrame | GONE
    outbox: deque = field(default_factory=deque)  # WorkerFrame | LOST
    side: GatewayStream | None = None  # the worker's
    ended: bool = False
    reading: dict[str, bytes] = field(default_factory=dict)  # sequence id -> the ticket it was sent

    @property
    def audible(self) -> bool:
        merged = not self.ended and self.side is not None and self.side._frames
        return bool(self.outbox or merged) and self.wire.gateway.alive

    def wake(self) -> None:
        """The worker has frames: some leave at once, others wait and are merged."""
        if not self.wire.calm and self.rng.random() < 0.5:
            self.pump()

    def pump(self) -> None:
        while not self.ended and self.side is not None and (frame := self.side.take()):
            self.outbox.append(frame)

    def end(self) -> None:
        """Each side still hears a part of what was under way, then learns that it is over."""
        if self.ended:
            return
        self.pump()
        self.ended = True
        for box in (self.inbox, self.outbox):
            for _ in range(self.rng.randrange(len(box) + 1)):
                box.pop()
        self.inbox.append(GONE)
        self.outbox.append(LOST)


class Wire:
    """See router.links.Wire: it is dialled again when the schedule says so."""

    def __init__(self, front: Front, gateway: Gateway, link: WorkerLink) -> None:
        self._front = front
        self.gateway, self.link = gateway, link
        self.stream: Stream | None = None
        gateway.wires[self] = None

    @property
    def calm(self) -> bool:
        return self._front.calm

    def send(self, frame: pb.GatewayFrame) -> None:
        if self.stream is None:
            return
        self._front.watch_sent(self.stream, frame)
        if not self.stream.ended:
            self.stream.inbox.append(frame)

    def cut(self, reason: str) -> None:
        self._front.see("cut: silent")
        self._hang_up()
        if self.stream is not None:
            self.stream.outbox.append(LOST)

    def close(self) -> None:
        self._hang_up()
        self.gateway.wires.pop(self, None)

    def dial(self) -> None:
        worker = self._front.resident(self.link.endpoint.address)
        if worker is None:
            self.lost("nobody answers")
            return
        self.stream = Stream(self, worker, self._front.rng)
        self.stream.inbox.append(HELLO)
        self._front.streams.append(self.stream)

    def lost(self, reason: str) -> None:
        self._front.touched[self.gateway] = None
        self._hang_up()
        self.stream = None
        if self.link.ended(reason) is None:
            self.gateway.wires.pop(self, None)

    def _hang_up(self) -> None:
        if self.stream is not None:
            self.stream.end()
            self.stream.outbox.clear()
            self.stream.reading.clear()


# -- gateways --------------------------------------------------------------------------------------


class Metrics:
    """Counts restarts; all others go nowhere."""

    def __init__(self, see: Callable[[str], None]) -> None:
        self.restarts = _Restarts(see)
        self.traffic = TrafficCount()

    def __getattr__(self, name: str) -> Metrics:
        return self

    def __call__(self, *_: object) -> None:
        pass


@dataclass
class _Restarts:
    see: Callable[[str], None]

    def inc(self, amount: float, cause: str) -> None:
        self.see(f"restarted: {cause}")
        self.see("restarted")


class Gateway:
    """One life of one gateway."""

    def __init__(self, name: str, front: Front) -> None:
        rng, clock = front.rng, front.clock
        self.name = name
        self.alive = True
        self.wires: dict[Wire, None] = {}
        self.told = -1  # the membership that it knows
        self.clients: list[Client] = []  # whose requests are under way
        self.view = ClusterView()
        self.timers = VirtualTimers(clock)
        self.ticks = Ticks(clock)
        self.links = Links(
            self.view,
            name,
            b"i" * 16,
            BLOCK,
            dial=lambda link: Wire(front, self, link),
            timers=self.ticks,
            clock=clock,
            settings=LINKS,
        )
        restarts = rng.choice([5, 50])
        self.dispatcher = self.links.listener = Dispatcher(
            view=self.view,
            links=self.links,
            timers=self.timers,
            policy=Policies().named(rng.choice(TWO_THIRDS_OURS)),
            limits=Limits(
                max_active=12,
                max_request_share=1,
                max_restarts=restarts,
                max_losses=rng.choice([2, 50]),
            ),
            metrics=Metrics(front.see),  # type: ignore[arg-type]
            hasher=HASHER,
            eos_token_ids=frozenset(),
            detokenizer_of=detokenizer,
            prefix=f"{name}-{next(front.lives)}",
            clock=clock,
            rng=random.Random(rng.getrandbits(32)),
        )

    def check(self, now: float) -> None:
        """What it keeps of sequences and requests is of those that are under way, and theirs."""
        dispatcher = self.dispatcher
        sequences = dispatcher._sequences
        for wire in self.wires:
            for key in wire.link.sequences:
                held = key in sequences and sequences[key].holders.get(wire.link.name) is wire.link
                assert held, "a link keeps a sequence that is over"
        for worker in self.view.workers.values():
            placed = {*worker.unseen, *worker.computing}
            own = {key for key in placed if key.startswith(dispatcher._prefix)}
            assert own <= sequences.keys(), "a placement outlived its sequence"
        admitted = sum(active.request.num_sequences for active in dispatcher._requests)
        assert dispatcher.active_sequences == admitted, "admission counts what is over"
        for active in dispatcher._requests:
            late = active.request.deadline is not None and active.request.deadline <= now
            assert not late, "a request outlived its deadline"
        for timer in self.timers.pending:
            if not timer.args:
                continue  # of the turns
            of = timer.args[0]
            over = of.phase is Phase.DONE if hasattr(of, "phase") else of.ended
            assert not over, "a timer is left of what is over"
        for sequence in dispatcher._waiting:
            roles = {w.role for w in self.view.workers.values() if not w.load.draining}
            if sequence.phase is Phase.HAND_OFF:
                served = Role.DECODE in roles
            else:
                served = self.view.ready
            assert not served, "a sequence waits for a worker that is there"

    @property
    def idle(self) -> bool:
        dispatcher = self.dispatcher
        computing = [worker.computing for worker in self.view.workers.values()]
        assert not any(computing), "what another gateway sent is never computed"
        timers = [timer for timer in self.timers.pending if timer.args]  # but for turns
        kept = dispatcher._requests, dispatcher._sequences, dispatcher._waiting, timers
        return not any(kept) and dispatcher.active_sequences == 0


class Front:
    """All gateways of one history, their clients and their streams."""

    def __init__(
        self,
        rng: random.Random,
        clock: Clock,
        see: Callable[[str], None],
        resident: Callable[[str], Worker | None],
        tight: bool,
        scoring: bool,
    ) -> None:
        """`tight`: few requests, and many of them as long as a request can be. `scoring`: some ask
        for the scores of their prompts, and some for nothing else."""
        self.rng, self.clock, self.see, self.resident = rng, clock, see, resident
        self.lives = count()
        self.members: list[WorkerEndpoint] = []
        self.version = 0  # of the membership
        self.calm = False
        self.tight, self.scoring = tight, scoring
        self.touched: dict[Gateway, None] = {}  # since the last check
        self.broken = ""  # what was found where an exception would be caught
        self.streams: list[Stream] = []
        self.clients: list[Client] = []
        self.gateways = [Gateway(f"gateway{i}", self) for i in range(rng.choice([1, 2]))]

    # -- what happens --------------------------------------------------------------------------

    def membership(self) -> None:
        """The controller tells one gateway who is there."""
        late = [gateway for gateway in self.gateways if gateway.told != self.version]
        if late:
            self.tell(self.rng.choice(late))

    def tell(self, gateway: Gateway) -> None:
        gateway.told = self.version
        self.touched[gateway] = None
        gateway.links.update(self.members)

    def dial_any(self) -> None:
        waiting = [wire for gateway in self.gateways for wire in self.undialled(gateway)]
        if waiting:
            self.rng.choice(waiting).dial()

    def undialled(self, gateway: Gateway) -> list[Wire]:
        return [wire for wire in gateway.wires if wire.stream is None]

    def stream_breaks(self) -> None:
        live = [stream for stream in self.streams if not stream.ended]
        if live:
            self.rng.choice(live).end()
            self.see("stream broken")

    def gateway_dies(self) -> None:
        """All its streams end at once; its requests are the clients' to repeat."""
        index = self.rng.randrange(len(self.gateways))
        dead = self.gateways[index]
        dead.alive = False
        for stream in [stream for stream in self.streams if stream.wire.gateway is dead]:
            stream.end()
            stream.outbox.clear()
        self.touched.pop(dead, None)
        for client in dead.clients:
            client.ends.append("gateway lost")
        self.gateways[index] = Gateway(dead.name, self)
        self.see("gateway lost")

    def new_request(self, anyway: bool = False) -> None:
        rng, now = self.rng, self.clock.now
        most, long, longest = (4, 0.5, 40) if self.tight else (4, 0.05, 24)
        if not anyway and len(self.clients) >= most:
            return
        shared = [11] * rng.choice([0, 8, 16])  # prefixes that caches can share
        prompt = shared + [rng.randrange(3, 900) for _ in range(rng.randrange(1, longest))]
        tokens = LONGEST - len(prompt) if rng.random() < long else rng.choice([1, 2, 4, 6, 8, 16])
        stop = ("1.",) if rng.random() < 0.1 else ()
        top = rng.choice([0, 2, None, None]) if self.scoring else None
        if self.scoring and rng.random() < 0.2:
            tokens = 0  # the prompt is all that is asked about
        sampling = SamplingParams(
            1.0, max_tokens=tokens, stop=stop, seed=rng.randrange(100), prompt_logprobs=top
        )
        request = Request(
            request_id=f"r{len(self.clients)}",
            prompts=[prompt],
            sampling=sampling,
            received=now,
            received_unix=now,
            n=2 if rng.random() < 0.1 else 1,
            deadline=now + rng.choice([5.0, 40.0]) if rng.random() < 0.2 else None,
        )
        gateway = rng.choice(self.gateways)
        self.touched[gateway] = None
        client = Client(request, gateway, self.see)
        self.clients.append(client)
        if not client.ends:
            gateway.clients.append(client)

    def client_leaves(self) -> None:
        waiting = [client for gateway in self.gateways for client in gateway.clients]
        if waiting:
            client = self.rng.choice(waiting)
            self.touched[client.gateway] = None
            client.leave()

    def hear_any(self) -> None:
        waiting = self.audible()
        if waiting:
            stream = self.rng.choice(waiting)
            for _ in range(self.rng.choice(SOME)):
                if stream.audible:
                    self.hear(stream)

    def audible(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.audible]

    def hear(self, stream: Stream) -> None:
        """One frame, or the end, at the gateway."""
        stream.pump()
        wire = stream.wire
        self.touched[wire.gateway] = None
        frame = stream.outbox.popleft() if stream.outbox else None
        if wire.stream is not stream:
            return
        if frame is LOST:
            wire.lost("the stream broke")
            return
        for output in frame.outputs:
            if output.finish_reason:
                stream.reading.pop(output.sequence_id, None)
            if output.HasField("error"):
                self.see(pb.ErrorCode.Name(output.error.code))
        if why := wire.link.receive(frame):
            self.see(f"hung up: {why.split(' ')[0]}")
            wire.lost(why)

    def fire_due(self, everybody: bool = False) -> bool:
        """Timers whose time has come. `everybody`: it has moved on."""
        fired = False
        for gateway in self.gateways:
            if gateway.timers.fire_due() or everybody:
                self.touched[gateway] = None
                fired = True
        return fired

    def silence(self) -> None:
        """A gateway hears nothing for so long of workers that are paused, or slow to say anything;
        of the others it hears their heartbeats."""
        gateway = self.rng.choice(self.gateways)
        for stream in [stream for stream in self.streams if stream.wire.gateway is gateway]:
            alive = self.resident(stream.wire.link.endpoint.address)
            if alive is stream.worker and self.rng.random() < 0.9:
                alive.host.beat()
                while stream.audible:
                    self.hear(stream)
        for _ in range(3):
            gateway.ticks.fire_due()

    # -- what is watched -----------------------------------------------------------------------

    def watch_sent(self, stream: Stream, frame: pb.GatewayFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind in ("prefill", "decode"):
            self._watch_asked(getattr(frame, kind).sequence, frame.decode.HasField("progress"))
        if kind == "cancel":
            stream.reading.pop(frame.cancel.sequence_id, None)
        elif kind == "decode" and frame.decode.HasField("progress"):
            ticket = frame.decode.progress.ticket
            for wire in stream.wire.gateway.wires:
                others = wire.stream is not stream and wire.stream is not None
                if others and ticket.ticket_id in wire.stream.reading.values():
                    self.broken = "a ticket was given to two readers"
            stream.reading[frame.decode.sequence.sequence_id] = ticket.ticket_id
            early = frame.decode.progress.ready_blocks < len(ticket.block_ids)
            self.see("reserved early" if early else "reserved late")
        elif kind == "decode":
            self.see("no hand-off")

    def _watch_asked(self, sequence: pb.SequenceRequest, handed_off: bool) -> None:
        """Of its prompt, what one attempt has scored the next one is not asked for."""
        if handed_off and not sequence.sampling.max_tokens:
            self.broken = "what asks for no token was handed off"
        if not sequence.sampling.HasField("prompt_logprobs"):
            return
        if handed_off and sequence.scored_tokens < sequence.prompt_tokens:
            self.broken = "a prompt is to be scored where it is not computed"
        elif not handed_off and 1 < sequence.scored_tokens < sequence.prompt_tokens:
            self.see("scoring goes on elsewhere")

    def check(self) -> None:
        assert not self.broken, self.broken
        for gateway in self.touched:
            for client in gateway.clients:
                client.read()
            gateway.clients = [client for client in gateway.clients if not client.ends]
            gateway.check(self.clock.now)
        self.touched.clear()

    def prune(self) -> None:
        """Forgets streams whose end both sides have heard."""
        self.streams = [s for s in self.streams if not s.ended or s.inbox or s.outbox]
