"""The controller's view of one worker or gateway, from its launch to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from crossdock.deploy.authority import Authority
from crossdock.deploy.reconcile import Member, State
from crossdock.deploy.runtime import CannotStart, Launch, Process, ProcessGone, Started, StartFailed
from crossdock.proto.channels import Channels
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc
from crossdock.worker.config import WorkerConfig

log = logging.getLogger(__name__)

RENEWAL_S = 10.0  # for a member to take a certificate


@dataclass(frozen=True)
class WatchSettings:
    """How closely members are watched, seconds."""

    probe_every_s: float = 1.0
    unresponsive_s: float = 30.0  # for a worker whose steps have no known length, and at most
    stalled_s: float = 8.0  # for a gateway, and at least
    stalled_steps: float = 10.0
    start_timeout_s: float = 900.0
    stop_grace_s: float = 5.0


def patience_s(
    settings: WatchSettings, worker: WorkerConfig | None, load: worker_pb2.Load | None
) -> float:
    """How long a member may be silent, seconds: a gateway (`worker` is None) hardly, a worker for
    ten of its longest steps, since it answers between two. Pure."""
    if worker is None:
        return settings.stalled_s
    if load is None or not (load.step_base_s or load.prefill_tokens_per_s):
        return settings.unresponsive_s
    step_s, rate = load.step_base_s, load.prefill_tokens_per_s
    batch_s = settings.stalled_steps * (step_s + load.step_per_sequence_s * worker.max_batch)
    # A chunk that was never measured takes no longer than its tokens one by one.
    token_s = settings.stalled_steps / rate if rate else step_s
    longest = max(settings.stalled_s, batch_s, worker.chunk_tokens * token_s)
    return min(settings.unresponsive_s, longest)


async def certify(process: Process, launch: Launch, authority: Authority) -> None:
    """Gives a process the certificate of who it was launched as. Raises as calls of it do."""
    for last in (False, True):
        request = await process.request_certificate()
        certificate = authority.sign(request, launch.role, launch.name)
        try:
            await process.certify(certificate, authority.certificate)
            return
        except StartFailed:  # a call of the controller before this one came in between
            if last:
                raise


class Watched(Member):
    """A member under watch, and its certificate. `changed` is called whenever its state is
    another."""

    def __init__(
        self,
        launch: Launch,
        process: Process,
        changed: Callable[[], None],
        settings: WatchSettings,
        authority: Authority,
        adopted: bool = False,
    ) -> None:
        identity = (launch.name, launch.pool, launch.role, launch.revision)
        super().__init__(*identity, State.STARTING, holds=launch.holds, model=launch.model)
        self.launch = launch
        self.process = process
        self.started: Started | None = None
        self.adopted = adopted  # it ran before this controller did
        self.launched_at = time.monotonic()
        self.ready_at: float | None = None
        self.lost_at: float | None = None
        self.hopeless = False  # lost, and so would be the next of its revision
        self.told: object = None  # the membership it has taken
        self.push: asyncio.Task[None] | None = None  # that tells it another
        self._changed = changed
        self._settings = settings
        self._authority = authority
        self._certified_at = 0.0  # on the wall clock, by which certificates end
        self._channels = Channels(authority.controller)
        self.load: worker_pb2.Load | None = None  # of its last answer
        self._tasks = [asyncio.create_task(self._watch_end()), asyncio.create_task(self._start())]

    @property
    def is_gateway(self) -> bool:
        """Whether it is a gateway and no worker."""
        return self.launch.gateway is not None

    @property
    def serves(self) -> bool:
        """Whether there may be requests under way on it."""
        return self.state in (State.READY, State.FLIPPING, State.DRAINING)

    @property
    def start_s(self) -> float | None:
        """How long it took to start; None: it has not, or was not watched meanwhile."""
        if self.ready_at is None or self.adopted:
            return None
        return self.ready_at - self.launched_at

    @property
    def barely_served(self) -> bool:
        """Whether it was lost sooner after its start than that start took."""
        if self.lost_at is None:
            return False
        if self.ready_at is None:
            return True
        return self.lost_at - self.ready_at < self.ready_at - self.launched_at

    def leave(self, timeout_s: float) -> None:
        """No new work from now on; `drain` carries it out."""
        self.state = State.DRAINING
        self.drain_deadline = time.monotonic() + timeout_s

    async def drain(self) -> None:
        """Has it finish what it serves, until its drain deadline."""
        try:
            remaining = max(0.0, self.drain_deadline - time.monotonic())
            self.drained = await self.process.drain(remaining)
        except ProcessGone as error:
            self._lost(str(error))
        if not self.drained:
            self.drain_deadline = min(self.drain_deadline, time.monotonic())
        self._changed()

    def turn_into(self, launch: Launch, timeout_s: float) -> None:
        """It is that worker from now on, to whoever counts; `flip` carries it out."""
        self.launch = launch
        self.name, self.pool, self.role = launch.name, launch.pool, launch.role
        self.revision = launch.revision
        self.state = State.FLIPPING
        self.drain_deadline = time.monotonic() + timeout_s

    async def flip(self) -> None:
        """Has it finish the work of its old role, until its drain deadline, and go on in the new
        one. Where that fails, it is to be stopped."""
        try:
            remaining = max(0.0, self.drain_deadline - time.monotonic())
            await self.process.drain(remaining, stays=True)
            await self._certify()
            self.started = await self.process.become(self.launch)
        except ProcessGone as error:
            self._lost(str(error))
        except (StartFailed, ValueError) as error:
            self.why = f"could not change its role: {error}"
            log.warning("%s %s", self.name, self.why)
            if self.state is State.FLIPPING:
                self.state, self.drained = State.DRAINING, True
        else:
            if self.state is State.FLIPPING:
                self.state, self.told = State.READY, None
                self.drain_deadline = float("inf")
        self._changed()

    async def stop(self) -> None:
        """Stops watching it, then ends its process."""
        self.release()
        await self._channels.keep(())
        await self.process.stop(self._settings.stop_grace_s)

    def release(self) -> None:
        """Stops watching and leaves the process as it is."""
        for task in self._tasks:
            task.cancel()

    async def status(
        self, check_integrity: bool = False, timeout_s: float = 3.0
    ) -> worker_pb2.WorkerStatus | None:
        """What the worker says of itself; None when it does not answer in time."""
        assert self.started is not None and self.started.endpoint is not None
        worker = self.started.endpoint
        stub = worker_pb2_grpc.WorkerStub(self._channels.get(worker.address, worker.incarnation))
        request = worker_pb2.GetStatusRequest(check_integrity=check_integrity)
        try:
            answer: worker_pb2.WorkerStatus = await stub.GetStatus(request, timeout=timeout_s)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, OSError):
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # gRPC's way to end calls of a closed channel: the worker is lost
        return answer

    async def renew(self) -> None:
        """Gives it another certificate once half of the life of its one is over."""
        half_s = self._authority.member_life.total_seconds() / 2
        if not self.serves or time.time() < self._certified_at + half_s:
            return
        try:
            async with asyncio.timeout(RENEWAL_S):
                await self._certify()
        except (TimeoutError, ValueError, StartFailed, ProcessGone) as error:
            log.warning("%s: its certificate was not renewed: %r", self.name, error)

    async def _certify(self) -> None:
        await certify(self.process, self.launch, self._authority)
        self._certified_at = time.time()

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await self._certify()
                self.started = await self.process.start()
        except TimeoutError:
            self._lost(f"not ready within {self._settings.start_timeout_s:g} s")
        except (StartFailed, ProcessGone) as error:
            self.hopeless = isinstance(error, CannotStart)
            self._lost(str(error))
        except Exception as error:
            log.exception("starting %s", self.name)
            self._lost(f"{type(error).__name__}: {error}")
        else:
            if self.state is State.STARTING:
                self.state = State.DRAINING if self.started.leaving else State.READY
                self.ready_at = time.monotonic()
                self._changed()
                self._tasks.append(asyncio.create_task(self._probe()))

    async def _watch_end(self) -> None:
        try:
            why = await self.process.gone()
        except Exception as error:
            log.exception("watching %s", self.name)
            why = f"{type(error).__name__}: {error}"
        self._lost(self.why or why)

    async def _probe(self) -> None:
        """One that does not answer any more is as good as dead: a worker's status comes from its
        engine thread, so an answer is progress. Probes are counted, not the clock, so that a pause
        of this process does not pass for the silence of its members."""
        silent, every_s = 0.0, self._settings.probe_every_s
        while self.state is not State.LOST:
            await asyncio.sleep(every_s)
            patience = patience_s(self._settings, self.launch.worker, self.load)
            asked = time.monotonic()
            if await self._answers(patience / 2):
                silent = 0.0
                continue
            silent += every_s + min(time.monotonic() - asked, patience / 2)
            if silent > patience:
                self.why = f"did not answer for {silent:.0f} s"
                await self.process.stop(grace_s=0.0)  # its ports and memory are the next one's
                self._lost(self.why)

    async def _answers(self, timeout_s: float) -> bool:
        if not self.is_gateway:
            status = await self.status(timeout_s=timeout_s)
            self.load = status.load if status is not None else self.load
            return status is not None
        try:
            async with asyncio.timeout(timeout_s):
                await self.process.active_requests()
        except (TimeoutError, ProcessGone, StartFailed):
            return False
        return True

    def _lost(self, why: str) -> None:
        if self.state is not State.LOST:
            log.warning("%s is lost: %s", self.name, why)
            self.state = State.LOST
            self.lost_at = time.monotonic()
            self.why = why
            self._changed()
