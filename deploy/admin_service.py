"""crossdock.v1.Admin over gRPC: what operators ask of the controller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence, Set
from dataclasses import asdict
from typing import Any, TypeAlias

import grpc

from crossdock.deploy.applied import Change
from crossdock.deploy.controller import Controller
from crossdock.deploy.members import Watched
from crossdock.deploy.reconcile import State
from crossdock.deploy.runtime import ProcessGone, StartFailed, targets
from crossdock.deploy.spec import GATEWAY_POOL, ClusterSpec
from crossdock.proto.channels import listen
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.errors import CrossdockError, NotFound
from crossdock.proto.identity import OPERATOR, admit
from crossdock.proto.types import Role
from crossdock.proto.v1 import admin_pb2, admin_pb2_grpc

DEFAULT_WAIT_S = 600.0
EXPLAIN_S = 5.0  # for a gateway to say what it knows of a request
LISTENING_S = 5.0  # for a member to look at its node
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Status: TypeAlias = admin_pb2.MemberStatus | admin_pb2.GatewayStatus


class AdminService(admin_pb2_grpc.AdminServicer):
    """The operators' calls, as admin.proto describes them; CrossdockErrors become gRPC statuses.
    Nobody else's certificate makes them."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def GetClusterStatus(
        self, request: admin_pb2.GetClusterStatusRequest, context: Context
    ) -> admin_pb2.ClusterStatus:
        """What is wanted and what is there, member by member."""
        await self._admit(context)
        return await cluster_status(self._controller, request.check_integrity, request.listening)

    async def Explain(
        self, request: admin_pb2.ExplainRequest, context: Context
    ) -> admin_pb2.ExplainedRequest:
        """The newest request of that id that a gateway knows. NOT_FOUND where none does."""
        await self._admit(context)
        async with _errors_sent(context):
            return await explained(self._controller, request.request_id)
        raise AssertionError("abort raises")

    async def Apply(
        self, request: admin_pb2.ApplyRequest, context: Context
    ) -> admin_pb2.ApplyResponse:
        """Takes a new spec. INVALID_ARGUMENT names the field that is wrong."""
        await self._admit(context)
        async with _errors_sent(context):
            file = request.file or "<apply>"
            spec = ClusterSpec.parse(request.yaml, file)
            if request.dry_run:
                actions = self._controller.plan(spec)
                return self._answer(actions, not actions and self._controller.converged)
            return await self._change(lambda _: spec, f"apply {file}", request)
        raise AssertionError("abort raises")

    async def Scale(
        self, request: admin_pb2.ScaleRequest, context: Context
    ) -> admin_pb2.ApplyResponse:
        """Changes the replicas of one pool."""
        await self._admit(context)
        async with _errors_sent(context):
            pool, replicas = request.pool, request.replicas
            return await self._change(
                lambda spec: spec.with_replicas(pool, replicas), f"scale {pool} {replicas}", request
            )
        raise AssertionError("abort raises")

    async def Down(
        self, request: admin_pb2.DownRequest, context: Context
    ) -> admin_pb2.DownResponse:
        """Ends the cluster, as Controller.down; answers once every member has stopped."""
        await self._admit(context)
        await self._controller.down(request.drain_s)
        return admin_pb2.DownResponse()

    async def _admit(self, context: Context) -> None:
        await admit(context, self._controller.authority.controller, OPERATOR)

    async def _change(
        self, to: Change, by: str, request: admin_pb2.ApplyRequest | admin_pb2.ScaleRequest
    ) -> admin_pb2.ApplyResponse:
        actions = await self._controller.change(to, by, request.generation)
        if not request.wait:
            return self._answer(actions, self._controller.converged)
        wait_s = request.timeout_s or DEFAULT_WAIT_S
        return self._answer(actions, await self._controller.wait_converged(wait_s, to))

    def _answer(self, actions: Sequence[str], converged: bool) -> admin_pb2.ApplyResponse:
        return admin_pb2.ApplyResponse(
            actions=actions,
            converged=converged,
            generation=self._controller.applied.generation,
            waiting_for=self._controller.waiting_for(),
            hopeless=self._controller.hopeless,
        )


async def serve_admin(controller: Controller, address: str) -> tuple[grpc.aio.Server, str]:
    """A started server, for operators alone, and the address it has. Raises ConfigError when the
    port is taken."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(controller), server)
    bound = listen(server, address, controller.authority.controller, "controller.grpc")
    await server.start()
    return server, bound


async def cluster_status(
    controller: Controller, check_integrity: bool = False, listening: bool = False
) -> admin_pb2.ClusterStatus:
    """The controller's state as operators see it, with each member's own counts and, where asked
    for, the ports that are listened on."""
    there = await asyncio.gather(
        *(_status_of(controller, watched, check_integrity) for watched in controller.members)
    )
    everyone = [*there, *_missing(controller, {each.name for each in there})]
    workers = [each for each in everyone if isinstance(each, admin_pb2.MemberStatus)]
    gateways = [each for each in everyone if isinstance(each, admin_pb2.GatewayStatus)]
    workers.sort(key=lambda w: (w.role, w.pool, len(w.name), w.name))
    gateways.sort(key=lambda g: (len(g.name), g.name))
    return admin_pb2.ClusterStatus(
        name=controller.spec.metadata.name,
        model=", ".join(controller.spec.models) or controller.spec.model.id,
        workers=workers,
        gateways=gateways,
        decisions=controller.decisions,
        converged=controller.converged,
        generation=controller.applied.generation,
        waiting_for=controller.waiting_for(),
        local=controller.runtime.local,
        nodes=await _nodes(controller) if listening else (),
        autoscaled=controller.scaler.status(),
        metrics_address=controller.metrics_address,
    )


async def explained(controller: Controller, request_id: str) -> admin_pb2.ExplainedRequest:
    """What the gateways know of a request. Raises NotFound, with those that did not answer."""
    gateways = [each for each in controller.members if each.is_gateway and each.started]
    answers = await asyncio.gather(*(_asked(each, request_id) for each in gateways))
    found = [admin_pb2.ExplainedRequest.FromString(answer) for answer in answers if answer]
    if found:
        return max(found, key=lambda each: each.received_unix_s)
    names = {each.name: answer is None for each, answer in zip(gateways, answers)}
    asked = ", ".join(name + " (did not answer)" * silent for name, silent in sorted(names.items()))
    raise NotFound(
        f"request {request_id!r} is not known to {asked or 'any gateway'}: it is another "
        "cluster's, its gateway was replaced, or newer ones took its place"
    )


async def _asked(gateway: Watched, request_id: str) -> bytes | None:
    """None where it does not answer."""
    with contextlib.suppress(TimeoutError, ProcessGone, StartFailed):
        async with asyncio.timeout(EXPLAIN_S):
            return await gateway.process.explain(request_id)
    return None


async def _nodes(controller: Controller) -> list[admin_pb2.NodePorts]:
    """By node, the ports of all the cluster's processes there: of the controller's, and of those
    with a member that looks in time."""
    node, here = await asyncio.to_thread(controller.runtime.listening)
    ports = {node: here}
    for watched in controller.members:
        if watched.started is not None and watched.started.node_id not in ports:
            with contextlib.suppress(TimeoutError, ProcessGone, StartFailed):
                async with asyncio.timeout(LISTENING_S):
                    ports[watched.started.node_id] = await watched.process.listening()
    return [
        admin_pb2.NodePorts(
            node_id=node, ports=[admin_pb2.ListeningPort(**asdict(each)) for each in there]
        )
        for node, there in sorted(ports.items())
    ]


def _missing(controller: Controller, there: Set[str]) -> Iterator[Status]:
    """Nothing runs in these places: they wait for the pause of a crash loop to end."""
    roles = {target.pool: target.role for target in targets(controller.spec)}
    for name, error in sorted(controller.errors.items()):
        pool = name.rpartition("-")[0]
        if name not in there and pool in roles and not controller.converged:
            yield _status(controller, pool, roles[pool], name, State.LOST, error=error)


async def _status_of(controller: Controller, watched: Watched, check_integrity: bool) -> Status:
    started = watched.started
    why, revision = controller.why_not_ready(watched), watched.revision
    known = (watched.pool, watched.role, watched.name, watched.state)
    status = _status(controller, *known, revision=revision, error=why)
    if isinstance(status, admin_pb2.MemberStatus):
        status.model, status.start_s = watched.model, watched.start_s or 0.0
    if started is None:
        return status
    status.pid = started.pid
    if isinstance(status, admin_pb2.GatewayStatus):
        status.grpc, status.http = started.grpc, started.http
        with contextlib.suppress(TimeoutError, ProcessGone):
            async with asyncio.timeout(2.0):
                status.active_requests = await watched.process.active_requests()
        return status
    status.address, status.node_id = started.address, started.node_id
    answer = await watched.status(check_integrity) if watched.state is not State.LOST else None
    if answer is not None:
        status.worker.CopyFrom(answer)
    return status


def _status(
    controller: Controller, pool: str, role: str, name: str, state: State, **more: str
) -> Status:
    restarts = controller.restarts[name]
    common: dict[str, Any] = {"name": name, "state": state.value, "restarts": restarts, **more}
    if pool == GATEWAY_POOL:
        return admin_pb2.GatewayStatus(**common)
    common["model"] = controller.spec.pools[pool].model if pool in controller.spec.pools else ""
    return admin_pb2.MemberStatus(pool=pool, role=ROLE_TO_PB[Role(role)], **common)


@contextlib.asynccontextmanager
async def _errors_sent(context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of a CrossdockError."""
    try:
        yield
    except CrossdockError as error:
        await context.abort(getattr(grpc.StatusCode, error.grpc_status), str(error))
