"""One worker on the virtual clock: its role, pool and loop are the product's; what carries frames
and calls to it is here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from crossdock.decode.role import DecodeRole
from crossdock.engine.profiles import Profile
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import StepPlan
from crossdock.kvtransfer.ticket import INCARNATION_BYTES
from crossdock.prefill.role import PrefillRole
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.errors import TransferFailed
from crossdock.proto.hashing import BlockHasher, hash_key
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.sim.clock import Event, VirtualClock
from crossdock.sim.engine import PacedEngine
from crossdock.sim.fabric import Fabric, SimTransport
from crossdock.sim.host import Host
from crossdock.worker.config import WorkerConfig
from crossdock.worker.description import describe, public
from crossdock.worker.gateways import Gateways
from crossdock.worker.loop import IDLE_WAIT_S, EngineLoop, Turn
from crossdock.worker.peers import Met, Peers, Renewed
from crossdock.worker.role import WorkerRole, WorkerState

HEARTBEAT_S = 1.0
CALL_S = 0.0002  # a message between two processes, one way


class Site:
    """What all processes of a simulated cluster share: the clock, the network, the cores, who is
    where."""

    def __init__(self, clock: VirtualClock, rng: random.Random) -> None:
        self.clock, self.rng = clock, rng
        self.fabric, self.host = Fabric(clock), Host()
        self.workers: dict[str, SimWorker] = {}  # by address, which is its name

    def post(self, callback: Callable[..., object], *args: object) -> None:
        """A message is under way to whoever it calls."""
        self.clock.call_later(CALL_S, callback, *args)


class _Loop(EngineLoop):
    """Has no thread: `woken` is called whenever there is something to do."""

    woken: Callable[[], None]

    def wake(self) -> None:
        self.woken()

    def post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self.woken()


class SimWorker:
    """What Gateways and Peers ask of a WorkerServer, and the turns of its engine thread. Steps of
    decodes alone that are alike are taken together, until something comes in between."""

    def __init__(self, site: Site, config: WorkerConfig, profile: Profile) -> None:
        self.site, self.config, self.profile = site, config, profile
        self.hasher = BlockHasher(hash_key(config.cluster_key), config.block_size)
        self.engine = engine = PacedEngine(config, profile, self._spend)
        incarnation = site.rng.randbytes(INCARNATION_BYTES)
        self.transport = SimTransport(site.fabric, incarnation, engine.memory, profile)
        self.vocab_size = engine.facts.vocab_size
        self.gone = False
        self.busy_s = 0.0  # of engine steps
        self._offset = 0.0  # of this worker's clock, while it goes through the end of a step
        self._woken = False
        self._plan: StepPlan | None = None  # under way, since `_began`, until `_end`
        self._began = 0.0
        self._slowed = 1.0  # times as long as alone it takes at present, which is
        self._since = 0.0  # so from here on;
        self._done_s = 0.0  # of the plan's seconds so many were over then
        self._end: Event
        self.description = describe(config, engine, self.transport, incarnation, config.name)
        self.public_description = public(self.description)
        state = WorkerState(
            config=config,
            pool=BlockPool(engine.memory.num_blocks, config.block_size, engine.memory.generations),
            hasher=self.hasher,
            context_length=self.description.context_length,
            layout_hash=self.description.layout_hash,
            incarnation=incarnation,
            transport=self.transport,
            memory=engine.memory,
            address=config.name,
            clock=self._clock,
            wall_clock=self._clock,
        )
        self.role = (PrefillRole if config.role is Role.PREFILL else DecodeRole)(state)
        self.loop = _Loop(self.role, engine, self._publish)
        self.loop.woken = self._wake
        self.transport.set_wakeup(self._wake)
        self.peers = Peers(_Calls(self), self._clock)
        self.gateways = Gateways(self, self._clock)

    def serve(self) -> None:
        """It can be reached from now on."""
        site = self.site
        site.workers[self.config.name] = self
        site.clock.call_later(site.rng.uniform(0, HEARTBEAT_S), self._beat)
        site.clock.call_later(self.config.lease_s / 3, self._renew)

    @property
    def endpoint(self) -> WorkerEndpoint:
        """As the membership names it."""
        config, incarnation = self.config, self.description.incarnation.hex()
        return WorkerEndpoint(config.name, config.pool, config.role, config.name, incarnation)

    # -- what Gateways asks --------------------------------------------------------------------

    def post(self, command: Callable[[WorkerRole], None]) -> None:
        """See WorkerServer.post."""
        self.loop.post(lambda: command(self.role))

    def post_snapshot(
        self,
        deliver: Callable[[pb.WorkerFrame], None],
        hello: pb.WorkerDescription | None = None,
    ) -> None:
        """See WorkerServer.post_snapshot."""
        self.loop.post(lambda: deliver(self.loop.snapshot(hello)))

    def drain(self) -> None:
        """See WorkerServer.drain: no new work; what it has goes on."""
        self.post(lambda role: setattr(role, "draining", True))
        self.loop.post(lambda: self._publish(Turn(load=self.role.load())))

    def eject(self) -> None:
        """What it still has goes on elsewhere."""
        why = f"{self.config.name} is draining"
        self.post(lambda role: role.eject_all(pb.ERROR_CODE_DRAINING, why))

    def become(self, name: str, pool: str, role: Role) -> None:
        """See WorkerServer.become: it has drained, and nobody sends to it."""
        for stream in self.gateways.deafen():
            self.gateways.ended(stream)
        del self.site.workers[self.config.name]
        self.config = config = replace(self.config, name=name, pool=pool, role=role)
        self.site.workers[name] = self
        for told in (self.description, self.public_description):
            told.name, told.pool, told.role, told.address = name, pool, ROLE_TO_PB[role], name
        state = self.role.state
        state.config, state.address = config, name
        self.role = (PrefillRole if role is Role.PREFILL else DecodeRole)(state)
        self.loop.become(self.role)
        self.peers.update(())

    def stop(self) -> None:
        """The process ends."""
        self.gone = True
        self.site.host.leave(self)
        self.transport.close()
        self.site.workers.pop(self.config.name, None)

    # -- turns ---------------------------------------------------------------------------------

    def _clock(self) -> float:
        return self.site.clock.now + self._offset

    def _spend(self) -> None:
        self._offset = 0.0

    def _wake(self) -> None:
        """There is something to do: at once, or when the step under way has ended."""
        if self._plan is not None:
            self._interrupt(self._plan)
        elif not self._woken:
            self._woken = True
            self.site.clock.call_later(0.0, self._begin)

    def _begin(self) -> None:
        self._woken = False
        if self._plan is not None:
            return
        plan = self.loop.begin()
        if plan is None:
            self.site.host.leave(self)
            self._rest(self.loop.end())
            return
        if self.profile.contention and not self.gone:
            self.site.host.enter(self, self._neighbours)
        self._plan, self._began = plan, self.site.clock.now
        self._since, self._done_s = self._began, 0.0
        self._plan_for(self.engine.most_steps(plan))

    def _plan_for(self, steps: int) -> None:
        assert self._plan is not None
        self.engine.steps = steps
        left_s = self.engine.seconds(self._plan, steps) - self._done_s
        self._end = self.site.clock.call_at(self._since + self._slowed * left_s, self._finish)

    def _neighbours(self, others: int) -> None:
        """So many other workers compute on this host from now on."""
        now = self.site.clock.now
        self._done_s += (now - self._since) / self._slowed
        self._since, self._slowed = now, self.profile.slowdown(others)
        if self._plan is not None:
            self._end.cancel()
            self._plan_for(self.engine.steps)

    def _interrupt(self, plan: StepPlan) -> None:
        """Of several steps that were taken for one, those that have not begun are not taken."""
        if self.engine.steps == 1:
            return
        done_s = self._done_s + (self.site.clock.now - self._since) / self._slowed
        begun = 1 + int(done_s / self.engine.seconds(plan, 1))
        if begun < self.engine.steps:
            self._end.cancel()
            self._plan_for(begun)

    def _finish(self) -> None:
        plan, self._plan, steps = self._plan, None, self.engine.steps
        assert plan is not None
        taken_s = self.site.clock.now - self._began
        self.busy_s += taken_s
        # The loop takes the time of a step by this clock, which stands still.
        self._offset = -taken_s / steps
        self.loop.step(plan)
        self._offset = 0.0
        self.loop.end()
        self._begin()

    def _rest(self, worked: bool) -> None:
        deadline, now = self.role.next_deadline(), self.site.clock.now
        if worked:
            self._wake()
        elif deadline is not None or self.role.jobs:
            wait_s = IDLE_WAIT_S if deadline is None else min(IDLE_WAIT_S, deadline - now)
            self.site.clock.call_later(max(0.0, wait_s), self._wake)

    def _publish(self, turn: Turn) -> None:
        self.gateways.publish(turn)
        if turn.ticket_releases:
            self.peers.release(turn.ticket_releases)

    def _beat(self) -> None:
        if self.gone:
            return
        self.site.clock.call_later(HEARTBEAT_S, self._beat)
        if self._plan is None:  # else it says how it stands at its end
            self.gateways.publish(Turn(load=self.role.load()))

    def _renew(self) -> None:
        if self.gone:
            return
        self.site.clock.call_later(self.config.lease_s / 3, self._renew)
        self.peers.renew(self.role.waiting_tickets(), self.config.lease_s, self._renewed)

    def _renewed(self, kept: set[bytes], lost: set[bytes], until: float) -> None:
        self.post(lambda role: role.leases_renewed((kept, lost), until))


class _Calls:
    """See worker.peers.PeerCalls."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker, self._site = worker, worker.site

    def introduce(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        self._site.post(self._meet, incarnation, address, done)

    def _meet(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        peer = self._site.workers.get(address)
        if peer is None or peer.description.incarnation != incarnation:
            self._site.post(done, TransferFailed(f"{address} is gone or another"))
            return
        told = peer.description
        info = told.transport_info
        self._worker.transport.add_peer(incarnation, info, told.num_blocks, told.block_bytes)
        self._site.post(done, told)

    def forget(self, incarnation: bytes) -> None:
        self._worker.transport.remove_peer(incarnation)

    def renew(
        self, address: str, ids: list[bytes], lease_s: float, done: Callable[[Renewed], None]
    ) -> None:
        def ask(role: WorkerRole) -> None:
            unknown = role.renew_tickets(ids, lease_s)
            self._site.post(done, pb.RenewLeasesResponse(unknown_ticket_ids=unknown))

        peer = self._site.workers.get(address)
        if peer is None:
            self._site.post(done, TransferFailed(f"{address} does not answer"))
        else:
            self._site.post(peer.post, ask)

    def release(self, address: str, ids: list[bytes]) -> None:
        peer = self._site.workers.get(address)
        if peer is not None:
            self._site.post(peer.post, lambda role: role.release_tickets(ids))
