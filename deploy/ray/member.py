"""The actor around one worker or gateway."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from crossdock.deploy import processes
from crossdock.deploy import telemetry as traces
from crossdock.deploy.authority import Applicant
from crossdock.deploy.home import crossdock_home
from crossdock.deploy.listening import Listening, listening
from crossdock.deploy.ray.calls import CRASHES
from crossdock.deploy.ray.node import pids_here
from crossdock.deploy.runtime import CannotStart, Launch, Membership, Started, StartFailed
from crossdock.proto import events
from crossdock.proto.errors import ConfigError, CrossdockError, ModelError
from crossdock.proto.identity import Credentials
from crossdock.proto.settings import loopback_host
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.router import garbage
from crossdock.router.dispatch.traffic import Traffic
from crossdock.router.serving import Serving

CONNECT_S = 5.0  # for a gateway to reach the workers that it was told of


class MemberActor:
    """One worker or gateway process. Lives until it is stopped or killed."""

    def __init__(self, launch: Launch) -> None:
        set_up_process(launch.name, launch.telemetry)
        with contextlib.suppress(KeyError, OSError):  # on another host than the controller's
            processes.record_crashes(os.environ[CRASHES])
        self._launch = launch
        self._applicant = Applicant()
        self._credentials: Credentials | None = None
        self._server: Any = None
        self._starting = asyncio.Lock()
        self._started: Started | None = None
        self._leaving = False
        self._stopped = asyncio.Event()

    async def request_certificate(self) -> bytes:
        """Asks (PEM) for a certificate; its key stays here."""
        return self._applicant.request()

    async def certify(self, certificate: bytes, authority: bytes) -> None:
        """Takes the answer (PEM). New connections use it."""
        identity = self._applicant.accept(certificate, authority)
        if self._credentials is None:
            self._credentials = Credentials(identity)
        else:
            self._credentials.renew(identity)

    async def start(self) -> Started:
        """Serves from here on; a second call gives the same, and whether it was told to leave
        meanwhile. Raises CannotStart or StartFailed."""
        async with self._starting:
            if self._started is None:
                try:
                    self._started = await self._start()
                except CrossdockError as error:
                    settled = isinstance(error, (ConfigError, ModelError))
                    failed = CannotStart if settled else StartFailed
                    raise failed(f"{type(error).__name__}: {error}") from None
            return dataclasses.replace(self._started, leaving=self._leaving)

    async def launch(self) -> Launch:
        """What it was made from, for a controller that adopts it."""
        return self._launch

    async def run(self) -> str:
        """Pends as long as the process lives: its end is noticed by whoever awaits this."""
        await self._stopped.wait()
        return "stopped"

    async def update(self, members: Membership) -> None:
        """Tells it of all workers; a gateway reaches them first, or waits CONNECT_S."""
        endpoints = list(members.endpoints)
        if self._launch.gateway is None:
            await self._server.update_peers(endpoints)
            return
        failure = await self._serve(members.serving) if members.serving is not None else ""
        await self._server.update_members(endpoints)
        if failure:
            raise StartFailed(failure)
        if _can_serve(endpoints):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_S):
                    while not self._server.ready:
                        await asyncio.sleep(0.02)

    async def _serve(self, serving: Serving) -> str:
        """Why a gateway goes on with the models that it has; empty where it took others."""
        try:
            await self._server.update_serving(serving)
        except ModelError as error:
            return f"ModelError: {error}"
        return ""

    async def drain(self, timeout_s: float, stays: bool = False) -> bool:
        """Whether it finished all it serves within `timeout_s` seconds. `stays`: it goes on in
        another role."""
        self._leaving = True
        if stays:
            return bool(await self._server.drain(timeout_s, stays=True))
        return bool(await self._server.drain(timeout_s))

    async def become(self, launch: Launch) -> Started:
        """Goes on as the worker of `launch`. Raises StartFailed where something is left of what
        it did before."""
        assert launch.worker is not None and self._started is not None
        try:
            endpoint = await self._server.become(launch.worker, _role_type(launch.role))
        except CrossdockError as error:
            raise StartFailed(f"{type(error).__name__}: {error}") from None
        self._launch = dataclasses.replace(launch, host=self._launch.host)
        self._leaving = False
        self._started = dataclasses.replace(self._started, endpoint=endpoint)
        name_logs(launch.name)
        return self._started

    async def active_requests(self) -> int:
        """Requests under way; 0 before it serves."""
        return int(self._server.active_requests) if self._started else 0

    async def traffic(self) -> Mapping[str, Traffic]:
        """What a gateway has counted, by model; nothing before it serves."""
        return self._server.traffic if self._started else {}

    async def explain(self, request_id: str) -> bytes:
        """What a gateway knows of a request, as Process."""
        found = self._server.explain(request_id) if self._started else None
        return b"" if found is None else found.SerializeToString()

    async def listening(self) -> Sequence[Listening]:
        """The ports of all the cluster's processes on this node."""
        return await asyncio.to_thread(listening, pids_here(loopback_host(self._launch.host)))

    async def stop(self) -> None:
        """Stops serving, then ends `run`."""
        self._leaving = True
        if self._server is not None:
            await self._server.stop()
        traces.flush()
        self._stopped.set()

    async def _start(self) -> Started:
        launch, node_id = self._launch, ray.get_runtime_context().get_node_id()
        if self._credentials is None:
            raise StartFailed("it has no certificate")
        os.environ.setdefault("NUMBA_CACHE_DIR", str(crossdock_home() / "numba"))
        # Imported here, in the actor: the controller and the driver need no torch.
        if launch.worker is not None:
            config = dataclasses.replace(
                launch.worker,
                host=launch.host or ray.util.get_node_ip_address(),
                node_id=node_id,
                home=crossdock_home(),
            )
            from crossdock.worker.server import WorkerServer

            self._server = WorkerServer(config, _role_type(launch.role), self._credentials)
            endpoint = await self._server.start()
            return Started(os.getpid(), node_id, endpoint=endpoint)
        from crossdock.router.gateway import GatewayServer

        assert launch.gateway is not None
        gateway = dataclasses.replace(launch.gateway, home=crossdock_home())
        self._server = GatewayServer(gateway, self._credentials)
        await self._server.start()
        garbage.settle()
        grpc, http = self._server.grpc_address, self._server.http_address
        return Started(os.getpid(), node_id, grpc=grpc, http=http)


def _role_type(role: str) -> Any:
    """Imported here, in the actor, as what it brings is heavy."""
    if role == Role.PREFILL:
        from crossdock.prefill.role import PrefillRole

        return PrefillRole
    from crossdock.decode.role import DecodeRole

    return DecodeRole


def _can_serve(endpoints: Sequence[WorkerEndpoint]) -> bool:
    roles = {endpoint.role for endpoint in endpoints}
    return Role.COLOCATED in roles or {Role.PREFILL, Role.DECODE} <= roles


def set_up_process(name: str, telemetry: Mapping[str, str]) -> None:
    """Logging and traces of a process of the cluster; `name` is the member's, or controller.

    Its working folder is one that only root writes to: UCX takes settings, and so code, from a
    ucx.conf that lies there.
    """
    os.chdir("/")
    logging.basicConfig(level=traces.log_level())
    name_logs(name)
    events.listen(traces.event_listener())
    traces.configure(telemetry, f"crossdock.{name.rpartition('-')[0] or name}", name)


def name_logs(name: str) -> None:
    """Every line of the log says who writes it, also after that has another name."""
    formatter = logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
