"""One worker process: model, KV pool, transport, engine thread and gRPC service, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import grpc

from crossdock.engine.registry import create as create_engine
from crossdock.engine.registry import memory_type
from crossdock.kvcache.block_pool import BlockPool, IntegrityError
from crossdock.kvtransfer.checksum import check_available
from crossdock.kvtransfer.registry import Allocator, create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.proto import events
from crossdock.proto.channels import STREAMS, listen
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.errors import Unavailable
from crossdock.proto.hashing import BlockHasher, hash_key
from crossdock.proto.identity import Credentials
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.worker import metrics
from crossdock.worker.config import WorkerConfig
from crossdock.worker.description import describe, public
from crossdock.worker.gateways import Gateways
from crossdock.worker.kept import KeptStates
from crossdock.worker.loop import EngineLoop, Turn
from crossdock.worker.peer_calls import GrpcPeerCalls, met
from crossdock.worker.peers import Peers
from crossdock.worker.probe import Prober
from crossdock.worker.role import WorkerRole, WorkerState
from crossdock.worker.service import WorkerService
from crossdock.worker.states import States

log = logging.getLogger(__name__)
T = TypeVar("T")
RoleType = Callable[[WorkerState], WorkerRole]

HEARTBEAT_S = 1.0
WATCH_S = 0.1  # between two looks at whether the engine hangs
STALLED_S = 30.0  # no engine turn for this long: the worker stops calling itself alive
MAX_MESSAGE_BYTES = 64 << 20


class WorkerServer:
    """Owns everything of one worker from `start` to `stop`. Without credentials it serves the
    loopback alone, and whoever calls."""

    def __init__(
        self,
        config: WorkerConfig,
        role_type: RoleType,
        credentials: Credentials | None = None,
    ):
        self.config = config
        self.credentials = credentials
        self.hasher = BlockHasher(hash_key(config.cluster_key), config.block_size)
        self.kept = KeptStates(States(), credentials)
        self._role_type = role_type
        self._others: list[WorkerEndpoint] = []  # of the cluster
        self._started_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = contextlib.ExitStack()

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> WorkerEndpoint:
        """Starts the engine and listens. Raises ModelError or ConfigError saying what is wrong."""
        self._asyncio = asyncio.get_running_loop()
        self._gateways = Gateways(self)
        self._grpc = grpc.aio.server(
            options=[
                *STREAMS,
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                # A gateway that hangs or is cut off is noticed within 4 s, and what it had is
                # freed. The time for an answer is ping_timeout's, whatever keepalive_timeout's is.
                ("grpc.keepalive_time_ms", 1000),
                ("grpc.keepalive_timeout_ms", 2500),
                ("grpc.http2.ping_timeout_ms", 2500),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(
            WorkerService(self, self._gateways), self._grpc
        )
        wanted = f"{self.config.host}:{self.config.port}"
        address = listen(self._grpc, wanted, self.credentials, "port")
        await asyncio.to_thread(self._build, address)
        layout = self.description.layout
        self.peer_calls = GrpcPeerCalls(layout, self._transport, self.credentials)
        self.peers = Peers(self.peer_calls, self._state.clock)
        self.prober = Prober(self, self._transport, self._state.memory.memory_type)
        self.description.metrics_address = metrics.serve(
            lambda: self._role, self.config.host, lambda: self.kept.states.held
        )
        self._loop.start()
        await self._grpc.start()
        self._tasks = [
            asyncio.create_task(self._every(HEARTBEAT_S, self._heartbeat)),
            asyncio.create_task(self._every(WATCH_S, self._watch_engine)),
            asyncio.create_task(self._every(self.config.lease_s / 3, self._renew_leases)),
        ]
        events.emit("started", self.config.name, f"{self.config.role}@{self.endpoint.incarnation}")
        return self.endpoint

    @property
    def endpoint(self) -> WorkerEndpoint:
        """Where this incarnation is reached; known once `start` has returned."""
        return WorkerEndpoint(
            name=self.config.name,
            pool=self.config.pool,
            role=self.config.role,
            address=self.description.address,
            incarnation=self.description.incarnation.hex(),
            revision=self.config.revision,
        )

    @property
    def public_description(self) -> pb.WorkerDescription:
        """Without the key to this pool, which is for those who read it."""
        return public(self.description)

    async def update_peers(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """The cluster's workers. Returns once all that can be pulled from are known."""
        endpoints = list(endpoints)
        self._others = [e for e in endpoints if e.incarnation != self.endpoint.incarnation]
        if self.config.role is not Role.DECODE:  # the only one that pulls
            return
        others = [endpoint for endpoint in endpoints if endpoint.role is Role.PREFILL]
        self.peers.update(others)
        meetings = (met(self.peers, bytes.fromhex(e.incarnation), e.address) for e in others)
        await asyncio.gather(*meetings, return_exceptions=True)
        await self.peer_calls.keep(endpoint.address for endpoint in others)

    async def drain(self, timeout_s: float, stays: bool = False) -> bool:
        """Takes no new work and waits for what is here; moves the rest away when time is up. False:
        offered tickets are left to their leases. What gateways keep here goes to other workers
        meanwhile, unless this one stays, in another role."""
        await self.call(lambda role: setattr(role, "draining", True))
        deadline = time.monotonic() + timeout_s
        others = self.kept.hand_over(self._others) if not stays else asyncio.sleep(0)
        handing_over = asyncio.create_task(others)
        while not await self.call(lambda role: role.idle):
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(0.05)
        await asyncio.wait([handing_over], timeout=max(0.0, deadline - time.monotonic()))
        handing_over.cancel()
        return await self.call(self._move_away)  # nothing, where it is idle

    def _move_away(self, role: WorkerRole) -> bool:
        role.eject_all(pb.ERROR_CODE_DRAINING, f"{self.config.name} is draining")
        return role.idle

    async def become(self, config: WorkerConfig, role_type: RoleType) -> WorkerEndpoint:
        """Goes on as another worker, by another name, with the engine, KV pool, prefix cache and
        transport that it has, once it is drained and the last lease and pull have ended. `config`
        may differ in name, pool, role and revision. Gateways are disconnected, and meet it anew.
        Raises Unavailable where something is left that does not end."""
        try:
            async with asyncio.timeout(config.lease_s + config.pull_timeout_s):
                while not await self.call(lambda role: role.draining and role.idle):
                    await asyncio.sleep(0.05)
            return await self._go_on_as(config, role_type)
        except TimeoutError:
            why = f"{self.config.name} cannot change its role: work is left that does not end"
            raise Unavailable(why) from None

    async def _go_on_as(self, config: WorkerConfig, role_type: RoleType) -> WorkerEndpoint:
        mine = self.config
        config = replace(mine, name=config.name, pool=config.pool, role=config.role,
                         revision=config.revision)  # fmt: skip
        # No await until the new role is on its way to the engine thread: what gateways' streams of
        # today bring goes to the old one, which refuses it, what new streams bring to the new one.
        streams = self._gateways.deafen()
        self.config = config
        told = self.description
        told.name, told.pool, told.revision = config.name, config.pool, config.revision
        told.role = ROLE_TO_PB[config.role]
        async with asyncio.timeout(STALLED_S):
            await self.call(lambda role: self._become(config, role_type))
        for stream in streams:
            stream.close()
        self.peers.update(())
        await self.peer_calls.keep(())
        events.emit("started", config.name, f"{config.role}@{self.endpoint.incarnation}")
        return self.endpoint

    def _become(self, config: WorkerConfig, role_type: RoleType) -> None:
        self._state.config = config
        self._role = role_type(self._state)
        self._loop.become(self._role)
        self._note_load(self._role)

    async def stop(self) -> None:
        """Ends streams, peers, engine thread and transport in that order, half started or not."""
        for task in self._tasks:
            task.cancel()
        if hasattr(self, "_grpc"):
            self._gateways.close()
            await self._grpc.stop(grace=0.2)
        if hasattr(self, "peers"):
            self.prober.close()
            self.peers.update(())
            await self.peer_calls.keep(())
        if hasattr(self, "_loop"):
            await asyncio.to_thread(self._loop.stop, 10.0)
        self._closing.close()

    async def status(self, check_integrity: bool = False) -> pb.WorkerStatus:
        """As of between two steps; `check_integrity` accounts for every block of the pool."""
        return await self.call(lambda role: self._status(role, check_integrity))

    @property
    def last_turn_age_s(self) -> float:
        """Seconds since the engine thread last turned over: its progress."""
        return time.monotonic() - self._loop.last_turn

    # -- to the engine thread ------------------------------------------------------------------

    def post(self, command: Callable[[WorkerRole], None]) -> None:
        """Runs a command on the engine thread between two steps, in the order of posting."""
        self._loop.post(lambda: command(self._role))

    async def call(self, command: Callable[[WorkerRole], T]) -> T:
        """The same with its result; raises what the command raised."""
        return await asyncio.wrap_future(self._loop.call(lambda: command(self._role)))

    def post_snapshot(
        self,
        deliver: Callable[[pb.WorkerFrame], None],
        hello: pb.WorkerDescription | None = None,
    ) -> None:
        """Has `deliver` called on the asyncio loop with the whole prefix cache and the load, in
        order with `Gateways.publish`."""

        def take() -> None:
            self._asyncio.call_soon_threadsafe(deliver, self._loop.snapshot(hello))

        self._loop.post(take)

    # -- inside --------------------------------------------------------------------------------

    def _build(self, address: str) -> None:
        config, credentials = self.config, self.credentials
        incarnation = (
            bytes.fromhex(credentials.peer.incarnation) if credentials else new_incarnation()
        )
        if config.verify == "checksum":
            check_available(memory_type(config))
        allocator = Allocator(config.transport)
        self._closing.callback(allocator.close)
        engine = create_engine(config, allocator)
        self._closing.callback(engine.close)
        engine.warmup()
        facts, memory = engine.facts, engine.memory
        self.vocab_size = facts.vocab_size
        self._transport = create_transport(
            config.transport,
            incarnation,
            memory,
            ucx=config.transport_options,
            cluster_key=config.cluster_key,
            host=config.host,
            hosts=engine.hosts,
        )
        self._closing.callback(self._transport.close)
        self.description = describe(config, engine, self._transport, incarnation, address)
        self._state = WorkerState(
            config=config,
            pool=BlockPool(memory.num_blocks, config.block_size, memory.generations),
            hasher=self.hasher,
            lookahead=facts.tokens_per_step - 1,
            context_length=self.description.context_length,
            layout_hash=self.description.layout_hash,
            incarnation=incarnation,
            transport=self._transport,
            memory=memory,
            address=address,
        )
        self._role = self._role_type(self._state)
        self._note_load(self._role)
        self._loop = EngineLoop(self._role, engine, self._publish)
        self._transport.set_wakeup(self._loop.wake)

    def _publish(self, turn: Turn) -> None:
        if turn.load is not None:
            self._load = turn.load, time.monotonic()
        self._asyncio.call_soon_threadsafe(self._gateways.publish, turn)
        if turn.ticket_releases:
            self._asyncio.call_soon_threadsafe(self.peers.release, turn.ticket_releases)

    async def _every(self, seconds: float, action: Callable[[], Awaitable[None]]) -> None:
        """For as long as this worker runs, whatever happens to one of the actions."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await action()
            except Exception:
                log.exception("%s failed; it is tried again", action.__name__)

    async def _heartbeat(self) -> None:
        # A long step must not look like a dead worker; an engine that stands still must.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.call(self._note_load), WATCH_S)
        self._tell_load()

    def _note_load(self, role: WorkerRole) -> None:
        self._load = role.load(), time.monotonic()

    async def _watch_engine(self) -> None:
        if self._loop.late:  # gateways hear of it at once
            self._tell_load()

    def _tell_load(self) -> None:
        last, at = self._load
        load = pb.Load(age_s=time.monotonic() - at, late=self._loop.late)
        load.MergeFrom(last)
        if self.last_turn_age_s < STALLED_S:
            self._gateways.publish(Turn(load=load))

    async def _renew_leases(self) -> None:
        tickets = await self.call(lambda role: role.waiting_tickets())

        def answered(renewed: set[bytes], lost: set[bytes], until: float) -> None:
            self.post(lambda role: role.leases_renewed((renewed, lost), until))

        self.peers.renew(tickets, self.config.lease_s, answered)

    def _status(self, role: WorkerRole, check_integrity: bool) -> pb.WorkerStatus:
        state, counters = role.state, role.state.counters
        told, integrity_error = pb.WorkerStatus.DESCRIPTOR.fields_by_name, ""
        if check_integrity:
            try:
                state.pool.check_integrity([*role.held(), *self.prober.held])
            except IntegrityError as error:
                integrity_error = str(error) or "integrity check failed"
        return pb.WorkerStatus(
            description=self.public_description,
            load=role.load(),
            leases=role.leases(),
            uptime_s=time.monotonic() - self._started_at,
            **{name: value for name, value in vars(counters).items() if name in told},
            integrity_error=integrity_error,
            used_blocks=state.pool.num_used,
            last_step_age_s=self.last_turn_age_s,
        )
