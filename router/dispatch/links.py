"""One long-lived stream to each worker of the membership: what it says and hears. A Wire does the
I/O: it opens streams, carries frames, and says when a stream has ended.

    CONNECTING ──hello──> OPEN ──stream breaks, silence──> CONNECTING (backoff) …
        └── another incarnation answers: wait for the membership ──┘
    any ──leaves the membership──> RETIRING (takes no new work) ──idle, or broken──> CLOSED

A link is of one incarnation: a restarted worker is another member and gets another link.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Protocol

from crossdock.proto.convert import ROLE_FROM_PB
from crossdock.proto.steps import Yields
from crossdock.proto.types import WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.ports import Timer, Timers
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import WorkerFacts, WorkerView

if TYPE_CHECKING:
    from crossdock.router.dispatch.dispatcher import Dispatcher

log = logging.getLogger(__name__)


BACKOFF_S = (0.1, 2.0)  # before a stream is opened again: at first, and at the longest


@dataclass(frozen=True)
class LinkSettings:
    """When a stream that says nothing is given up."""

    silence_s: float = 5.0  # workers send a frame at least once a second
    tick_s: float = 0.5


class LinkState(enum.Enum):
    CONNECTING = "connecting"
    OPEN = "open"
    RETIRING = "retiring"
    CLOSED = "closed"


class Wire(Protocol):
    """Opens a stream to a link's worker, and another when that has ended, until it is closed.

    A stream begins with `link.hello`; each frame of the worker goes to `link.receive`, and the end
    of a stream, or of a try to open one, to `link.ended`.
    """

    def send(self, frame: pb.GatewayFrame) -> None:
        """Dropped where there is no stream."""

    def cut(self, reason: str) -> None:
        """Ends the stream as if it had broken."""

    def close(self) -> None: ...


class WorkerLink:
    """The stream to one incarnation of one worker, kept up while it is a member."""

    def __init__(self, endpoint: WorkerEndpoint, owner: Links) -> None:
        self.endpoint = endpoint
        self.state = LinkState.CONNECTING
        self.sequences: dict[str, None] = {}  # what this gateway has on the worker now, in order
        self.silent_ticks = 0
        self._owner = owner
        self._worker: WorkerView | None = None
        self._greeted = False  # this stream's first frame was the member's
        self._next_event: int | None = None  # None: a snapshot was asked for
        self._backoff_s = BACKOFF_S[0]
        self._wire = owner.dial(self)

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def usable(self) -> bool:
        return self.state is LinkState.OPEN

    @property
    def hello(self) -> pb.GatewayFrame:
        owner = self._owner
        hello = pb.GatewayHello(gateway=owner.gateway, incarnation=owner.incarnation)
        return pb.GatewayFrame(hello=hello)

    def send(self, frame: pb.GatewayFrame) -> None:
        self._wire.send(frame)

    def retire(self) -> None:
        """The worker left the membership: no new work, and close once nothing is left on it."""
        if self.state is LinkState.OPEN and self.sequences:
            self.state = LinkState.RETIRING
            self._leave_view()
        else:
            self.close()

    def close(self) -> None:
        if self.state is not LinkState.CLOSED:
            self.state = LinkState.CLOSED
            self._leave_view()
            self._wire.close()

    def tick(self) -> None:
        """A tick of the watchdog passed; a stream that was silent for too long is given up."""
        self.silent_ticks += 1
        settings = self._owner.settings
        if self.silent_ticks > settings.silence_s / settings.tick_s:
            self.silent_ticks = 0
            self._wire.cut(f"silent for {settings.silence_s:g} s")

    # -- the wire's side ----------------------------------------------------------------------

    def receive(self, frame: pb.WorkerFrame) -> str:
        """Takes a frame. Returns why the stream is to end; empty where it goes on."""
        if not self._greeted:
            if refusal := self._refusal(frame):
                log.warning("worker %s at %s: %s", self.name, self.endpoint.address, refusal)
                return refusal
            self._greeted = True
            self._open(frame.hello, has_snapshot=frame.block_events.snapshot)
        return self._take(frame)

    def ended(self, reason: str) -> float | None:
        """The stream is over. Returns in how many seconds to open another; None: never."""
        was_open = self._worker is not None or self.state is LinkState.RETIRING
        self._leave_view()
        if was_open:
            in_order = self.state is LinkState.RETIRING and not self.sequences
            say = log.info if in_order else log.warning
            say("worker %s at %s: stream ended: %s", self.name, self.endpoint.address, reason)
            if not in_order:
                self._owner.listener.on_lost(self, reason)
        if self.state is LinkState.RETIRING:
            self.state = LinkState.CLOSED
            self._owner.forget(self)
        if self.state is LinkState.CLOSED:
            return None
        self.state, self._greeted = LinkState.CONNECTING, False
        first_s, longest_s = BACKOFF_S
        self._backoff_s = first_s if was_open else min(self._backoff_s * 2, longest_s)
        return self._backoff_s

    def _refusal(self, frame: pb.WorkerFrame) -> str:
        """Why this peer is not the member that we meant to reach; empty when it is."""
        if not frame.HasField("hello"):
            return "its first frame has no hello"
        found = frame.hello.incarnation.hex()
        if found != self.endpoint.incarnation:
            return f"incarnation {found} answers where {self.endpoint.incarnation} is the member"
        if frame.hello.name != self.name:
            return f"it is {frame.hello.name} by now"
        return ""

    def _open(self, hello: pb.WorkerDescription, *, has_snapshot: bool) -> None:
        facts = WorkerFacts(
            name=self.name,
            role=ROLE_FROM_PB.get(hello.role, self.endpoint.role),
            incarnation=self.endpoint.incarnation,
            num_blocks=hello.num_blocks,
            block_size=hello.layout.block_size,
            block_bytes=hello.block_bytes,
            pool=self.endpoint.pool,
            layout_hash=hello.layout_hash,
            context_length=hello.context_length,
            max_batch=hello.max_batch,
            chunk_tokens=hello.chunk_tokens,
            gpus=hello.gpus,
            weights_digest=hello.layout.weights_digest,
        )
        if facts.block_size != self._owner.block_size:
            log.warning(
                "worker %s has blocks of %d tokens, the gateway hashes %d: no prefix will be found",
                self.name, facts.block_size, self._owner.block_size,
            )  # fmt: skip
        if self.state is LinkState.CONNECTING:
            self.state = LinkState.OPEN
            self._worker = self._owner.view.connected(facts, self._owner.clock())
        if not has_snapshot:
            self._resync()
        self._owner.listener.on_change()

    def _take(self, frame: pb.WorkerFrame) -> str:
        self.silent_ticks = 0
        # What the cache gained goes first: it lets what follows these outputs be placed well.
        if frame.HasField("block_events"):
            self._take_blocks(frame.block_events)
        if frame.HasField("load") and self._worker is not None:
            self._take_load(self._worker, frame.load)
        if frame.placed or frame.computed:
            self._take_others(frame)
        if frame.outputs:
            self._owner.listener.on_outputs(self, frame.outputs)
        if frame.HasField("load") and self._worker is not None:
            self._owner.listener.on_load(self._worker)
        done = self.state is LinkState.RETIRING and not self.sequences
        return "it left the cluster" if done else ""

    def _take_load(self, worker: WorkerView, load: pb.Load) -> None:
        was_draining = worker.load.draining
        self._owner.view.reported(worker, load, self._owner.clock())
        if load.draining != was_draining:
            self._owner.listener.on_change()

    def _take_others(self, frame: pb.WorkerFrame) -> None:
        """What other gateways have there counts as if it were placed from here."""
        view, now = self._owner.view, self._owner.clock()
        if self._worker is not None:
            for each in frame.placed:
                yields = min(max(each.yields, Yields.NOT), Yields.LATE)
                about = each.sequence_id, each.num_tokens, each.uncached_tokens, yields
                view.placed_elsewhere(self.name, *about, now)
            for sequence_id in frame.computed:
                view.computed(self.name, sequence_id, now)
                view.unplace(self.name, sequence_id)

    def _take_blocks(self, batch: pb.BlockEvents) -> None:
        if self._worker is None:
            return
        index, slot = self._owner.view.index, self._worker.slot
        if batch.snapshot:
            index.replace(slot, (event.block_hash for event in batch.events if event.stored))
            self._next_event = batch.first_sequence + len(batch.events)
            return
        if self._next_event is None:
            return  # a snapshot that covers these is on its way
        if batch.first_sequence != self._next_event:
            log.info("worker %s: block event %d was to come and %d came, asking for a snapshot",
                     self.name, self._next_event, batch.first_sequence)  # fmt: skip
            self._owner.resyncs += 1
            self._resync()
            return
        for event in batch.events:
            if event.stored:
                index.add(slot, event.block_hash)
            else:
                index.remove(slot, event.block_hash)
        self._next_event += len(batch.events)

    def _resync(self) -> None:
        self._next_event = None
        self.send(pb.GatewayFrame(resync=pb.ResyncBlocks()))

    def _leave_view(self) -> None:
        if self._worker is not None:
            self._owner.view.disconnected(self.name, self.endpoint.incarnation)
            self._worker = None
            self._owner.listener.on_change()


@dataclass(eq=False)
class Links:
    """All links of one gateway; follows the membership that the controller pushes."""

    view: ClusterView
    gateway: str
    incarnation: bytes
    block_size: int
    _: KW_ONLY
    dial: Callable[[WorkerLink], Wire]
    timers: Timers
    clock: Callable[[], float]
    settings: LinkSettings
    listener: Dispatcher = field(init=False)  # set before the first update
    resyncs: int = 0
    _members: dict[tuple[str, str], WorkerLink] = field(default_factory=dict)
    _retiring: dict[WorkerLink, None] = field(default_factory=dict)
    _tick: Timer | None = None

    def get(self, name: str) -> WorkerLink | None:
        """The open link to the worker that holds this name now."""
        worker = self.view.workers.get(name)
        if worker is None:
            return None
        link = self._members.get((name, worker.facts.incarnation))
        return link if link is not None and link.usable else None

    def reached(self) -> list[WorkerEndpoint]:
        """The members whose streams are open."""
        return [link.endpoint for link in self._members.values() if link.usable]

    def update(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """Takes a new membership: opens, keeps and retires links accordingly."""
        wanted = {(e.name, e.incarnation): e for e in endpoints}
        for key in [key for key in self._members if key not in wanted]:
            link = self._members.pop(key)
            self._retiring[link] = None
            link.retire()
            if link.state is LinkState.CLOSED:
                self.forget(link)
        for key, endpoint in wanted.items():
            if key not in self._members:
                self._members[key] = WorkerLink(endpoint, self)
        if self._tick is None:
            self._watch()

    def forget(self, link: WorkerLink) -> None:
        self._retiring.pop(link, None)

    def close(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        for link in [*self._members.values(), *self._retiring]:
            link.close()
        self._members.clear()
        self._retiring.clear()

    def _watch(self) -> None:
        """Breaks streams that fell silent. Counts its own turns, not the clock, so that a pause of
        this process does not pass for the silence of its peers."""
        self._tick = self.timers.call_later(self.settings.tick_s, self._watch)
        open_links = [link for link in self._members.values() if link.usable]
        for link in [*open_links, *self._retiring]:
            link.tick()
