"""One long-lived stream to each worker of the membership.

    CONNECTING ──hello──> OPEN ──stream breaks, silence──> CONNECTING (backoff) …
        └── another incarnation answers: wait for the membership ──┘
    any ──leaves the membership──> RETIRING (takes no new work) ──idle, or broken──> CLOSED

A link is of one incarnation: a restarted worker is another member and gets another link.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from crossdock.proto.convert import ROLE_FROM_PB
from crossdock.proto.types import WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.router.placement.view import ClusterView, LoadReport, WorkerFacts, WorkerView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkSettings:
    hello_timeout_s: float = 10.0
    silence_s: float = 5.0  # workers send a frame at least once a second
    tick_s: float = 0.5
    first_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    keepalive_s: float = 5.0
    max_frame_bytes: int = 256 * 2**20  # a snapshot of a large prefix cache is one frame


class LinkState(enum.Enum):
    CONNECTING = "connecting"
    OPEN = "open"
    RETIRING = "retiring"
    CLOSED = "closed"


class LinkListener(Protocol):
    """Who owns the sequences that travel over the links."""

    def on_outputs(self, link: WorkerLink, outputs: Sequence[pb.SequenceOutput]) -> None: ...

    def on_lost(self, link: WorkerLink, reason: str) -> None:
        """The stream broke: nothing that was sent over it will be answered."""

    def on_change(self) -> None:
        """A worker was connected or lost, or began to drain: readiness may have changed."""


class WorkerLink:
    """The stream to one incarnation of one worker, kept up while it is a member."""

    def __init__(self, endpoint: WorkerEndpoint, owner: Links) -> None:
        self.endpoint = endpoint
        self.state = LinkState.CONNECTING
        self.sequences: set[str] = set()  # what this gateway has on the worker now
        self.silent_ticks = 0
        self._owner = owner
        self._worker: WorkerView | None = None
        self._next_event: int | None = None  # None: a snapshot was asked for
        self._call: Any = None
        self._broken = ""  # why we cancelled the call ourselves
        self._outbox: deque[pb.GatewayFrame] = deque()
        self._outbox_filled = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(
            self._run(), name=f"link-{endpoint.name}"
        )

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def usable(self) -> bool:
        return self.state is LinkState.OPEN

    def send(self, frame: pb.GatewayFrame) -> None:
        """Queues a frame; it leaves in this turn of the loop. Dropped when the stream is gone."""
        if self._call is not None:
            self._outbox.append(frame)
            self._outbox_filled.set()

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
            self._task.cancel()

    async def closed(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def break_stream(self, reason: str) -> None:
        """Gives the stream up, as when it breaks by itself."""
        self._broken = reason
        if self._call is not None:
            self._call.cancel()

    # -- the stream ---------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = self._owner.settings.first_backoff_s
        while self.state is not LinkState.CLOSED:
            reason = "closed"
            try:
                reason = await self._stream()
            finally:
                opened = self._worker is not None or self.state is LinkState.RETIRING
                self._lose(reason)
            if self.state is LinkState.RETIRING:
                self.state = LinkState.CLOSED
                self._owner.forget(self)
            if self.state is LinkState.CLOSED:
                return
            self.state = LinkState.CONNECTING
            first = self._owner.settings.first_backoff_s
            backoff = first if opened else min(backoff * 2, self._owner.settings.max_backoff_s)
            await asyncio.sleep(backoff)

    async def _stream(self) -> str:
        """Lives one stream from connect to its end; the answer says why it ended."""
        self._broken = ""
        async with grpc.aio.insecure_channel(
            self.endpoint.address, options=_channel_options(self._owner.settings)
        ) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Connect()
            self._call = call
            writer = asyncio.get_running_loop().create_task(self._write(call))
            try:
                return await self._read(call)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except TimeoutError:
                return f"no hello within {self._owner.settings.hello_timeout_s} s"
            except asyncio.CancelledError:
                if self._broken and self.state is not LinkState.CLOSED:
                    return self._broken
                raise
            except Exception as error:
                log.exception("worker %s: its stream could not be read", self.name)
                return f"{type(error).__name__}: {error}"
            finally:
                self._call = None
                self._outbox.clear()
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        owner = self._owner
        hello = pb.GatewayHello(gateway=owner.gateway, incarnation=owner.incarnation)
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await call.write(pb.GatewayFrame(hello=hello))
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._outbox_filled.clear()
                await self._outbox_filled.wait()

    async def _read(self, call: Any) -> str:
        frame = await asyncio.wait_for(call.read(), self._owner.settings.hello_timeout_s)
        if frame is grpc.aio.EOF:
            return "the worker closed the stream"
        if refusal := self._refusal(frame):
            log.warning("worker %s at %s: %s", self.name, self.endpoint.address, refusal)
            return refusal
        self._open(frame.hello, has_snapshot=frame.block_events.snapshot)
        while frame is not grpc.aio.EOF:
            self._take(frame)
            frame = await call.read()
        return "the worker closed the stream"

    def _refusal(self, frame: pb.WorkerFrame) -> str:
        """Why this peer is not the member that we meant to reach; empty when it is."""
        if not frame.HasField("hello"):
            return "its first frame has no hello"
        found = frame.hello.incarnation.hex()
        if found != self.endpoint.incarnation:
            return f"incarnation {found} answers where {self.endpoint.incarnation} is the member"
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

    def _take(self, frame: pb.WorkerFrame) -> None:
        self.silent_ticks = 0
        # What the cache gained goes first: it lets what follows these outputs be placed well.
        if frame.HasField("block_events"):
            self._take_blocks(frame.block_events)
        if frame.HasField("load") and self._worker is not None:
            self._take_load(self._worker, frame.load)
        if frame.outputs:
            self._owner.listener.on_outputs(self, frame.outputs)
        if self.state is LinkState.RETIRING and not self.sequences:
            self.break_stream("it left the cluster")

    def _take_load(self, worker: WorkerView, load: pb.Load) -> None:
        was_draining = worker.load.draining
        report = LoadReport(
            waiting=load.waiting,
            running=load.running,
            queued_tokens=load.queued_tokens,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            total_blocks=load.total_blocks,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_base_s=load.step_base_s,
            step_per_sequence_s=load.step_per_sequence_s,
            draining=load.draining,
        )
        self._owner.view.reported(worker, report, self._owner.clock())
        if load.draining != was_draining:
            self._owner.listener.on_change()

    def _take_blocks(self, batch: pb.BlockEvents) -> None:
        if self._worker is None:
            return
        index, slot = self._owner.view.index, self._worker.slot
        after = batch.first_sequence + len(batch.events)
        if batch.snapshot:
            index.replace(slot, (event.block_hash for event in batch.events if event.stored))
            self._next_event = after
            return
        if self._next_event is None or after <= self._next_event:
            return  # a snapshot that covers these is on its way, or has come
        if batch.first_sequence > self._next_event:
            log.info("worker %s: block events %d to %d were lost, asking for a snapshot",
                     self.name, self._next_event, batch.first_sequence - 1)  # fmt: skip
            self._owner.resyncs += 1
            self._resync()
            return
        for event in batch.events[self._next_event - batch.first_sequence :]:
            if event.stored:
                index.add(slot, event.block_hash)
            else:
                index.remove(slot, event.block_hash)
        self._next_event = after

    def _resync(self) -> None:
        self._next_event = None
        self.send(pb.GatewayFrame(resync=pb.ResyncBlocks()))

    # -- the end ------------------------------------------------------------------------------

    def _lose(self, reason: str) -> None:
        was_open = self._worker is not None or self.state is LinkState.RETIRING
        self._leave_view()
        if was_open:
            log.warning(
                "worker %s at %s: stream ended: %s", self.name, self.endpoint.address, reason
            )
            self._owner.listener.on_lost(self, reason)

    def _leave_view(self) -> None:
        if self._worker is not None:
            self._owner.view.disconnected(self.name, self.endpoint.incarnation)
            self._worker = None
            self._owner.listener.on_change()


class Links:
    """All links of one gateway; follows the membership that the controller pushes."""

    def __init__(
        self,
        view: ClusterView,
        listener: LinkListener,
        gateway: str,
        incarnation: bytes,
        block_size: int,
        settings: LinkSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = view
        self.listener = listener
        self.gateway = gateway
        self.incarnation = incarnation
        self.block_size = block_size
        self.settings = settings or LinkSettings()
        self.clock = clock
        self.resyncs = 0
        self._members: dict[tuple[str, str], WorkerLink] = {}
        self._retiring: set[WorkerLink] = set()
        self._watchdog: asyncio.Task[None] | None = None

    def get(self, name: str) -> WorkerLink | None:
        """The open link to the worker that holds this name now."""
        worker = self.view.workers.get(name)
        if worker is None:
            return None
        link = self._members.get((name, worker.facts.incarnation))
        return link if link is not None and link.usable else None

    @property
    def open_links(self) -> list[WorkerLink]:
        return [link for link in self._members.values() if link.usable]

    def update(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """Takes a new membership: opens, keeps and retires links accordingly."""
        wanted = {(e.name, e.incarnation): e for e in endpoints}
        for key in [key for key in self._members if key not in wanted]:
            link = self._members.pop(key)
            self._retiring.add(link)
            link.retire()
            if link.state is LinkState.CLOSED:
                self.forget(link)
        for key, endpoint in wanted.items():
            if key not in self._members:
                self._members[key] = WorkerLink(endpoint, self)
        if self._watchdog is None:
            self._watchdog = asyncio.get_running_loop().create_task(self._watch())

    def forget(self, link: WorkerLink) -> None:
        self._retiring.discard(link)

    async def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        links = [*self._members.values(), *self._retiring]
        self._members.clear()
        self._retiring.clear()
        for link in links:
            link.close()
        await asyncio.gather(*(link.closed() for link in links))

    async def _watch(self) -> None:
        """Breaks streams that fell silent. Counts its own turns, not the clock, so that a pause of
        this process does not pass for the silence of its peers."""
        limit = self.settings.silence_s / self.settings.tick_s
        while True:
            await asyncio.sleep(self.settings.tick_s)
            for link in [*self.open_links, *self._retiring]:
                link.silent_ticks += 1
                if link.silent_ticks > limit:
                    link.silent_ticks = 0
                    link.break_stream(f"silent for {self.settings.silence_s:g} s")


def _channel_options(settings: LinkSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(settings.keepalive_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", settings.max_frame_bytes),
        ("grpc.max_send_message_length", settings.max_frame_bytes),
    ]
