"""The controller's actor, and its handle for the process that started the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from crossdock.deploy import credentials
from crossdock.deploy.authority import gateways_key
from crossdock.deploy.ray.calls import CRASHES, get, kill_process
from crossdock.deploy.ray.member import set_up_process
from crossdock.deploy.ray.mirror import GcsMirror
from crossdock.deploy.ray.runtime import RayRuntime, actor_options, namespace
from crossdock.deploy.runtime import Placement, StartFailed
from crossdock.deploy.spec import ClusterSpec, plain
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError
from crossdock.router.config import probe_key

log = logging.getLogger(__name__)

CONTROLLER = "controller"


class ControllerActor:
    """The control plane's process. Ray restarts it; the spec on disk and the actors outlive it."""

    def __init__(
        self, cluster: str, yaml: str, life: str, telemetry: Mapping[str, str], local: bool
    ) -> None:
        set_up_process(CONTROLLER, telemetry)
        store = ClusterStore(cluster, mirror=GcsMirror(cluster))
        os.environ[CRASHES] = str(store.folder)
        self._failed = ""
        self._controller: Any = None
        self._started = asyncio.Event()
        serving = self._serve(store, yaml, life, RayRuntime(cluster, local))
        self._loop_task = asyncio.get_running_loop().create_task(serving)

    async def started(self) -> str:
        """The address it answers operators at. Raises StartFailed."""
        await self._started.wait()
        if self._failed:
            raise StartFailed(self._failed)
        return self._address

    async def status(self) -> bytes:
        """A serialized ClusterStatus."""
        from crossdock.deploy.admin_service import cluster_status

        await self.started()
        return (await cluster_status(self._controller)).SerializeToString()

    async def credential(self) -> bytes:
        """An operator's."""
        await self.started()
        return credentials.write(self._controller.authority, self._address)

    async def probe_key(self) -> str:
        """With which the cluster's gateways are tried."""
        await self.started()
        return self._probe_key

    async def ping(self) -> None:
        """Answers while its loop turns."""

    async def run(self) -> None:
        """Pends as long as the process lives, which is until the cluster is down."""
        await asyncio.Event().wait()

    async def down(self, drain_s: float) -> None:
        """Ends the cluster; requests under way get `drain_s` seconds."""
        await self._started.wait()
        if self._controller is not None:
            await self._controller.down(drain_s)
        else:
            ray.actor.exit_actor()

    async def _serve(self, store: ClusterStore, yaml: str, life: str, runtime: RayRuntime) -> None:
        from crossdock.deploy import metrics
        from crossdock.deploy.admin_service import serve_admin
        from crossdock.deploy.controller import Controller

        try:
            store.begin(yaml, life)  # a restarted controller goes on with what is there
            controller = Controller(runtime, store)
            server, self._address = await serve_admin(controller, controller.spec.controller.grpc)
        except Exception as error:
            log.exception("the controller cannot start")
            self._failed = f"{type(error).__name__}: {error}"
            self._started.set()
            return
        self._controller = controller
        host = "127.0.0.1" if runtime.local else ray.util.get_node_ip_address()
        controller.metrics_address = metrics.serve(controller, host)
        self._probe_key = probe_key(gateways_key(store.key()))
        tending = credentials.tend(controller, store, self._address)
        self._tending = asyncio.get_running_loop().create_task(tending)
        self._started.set()
        await controller.run()
        self._tending.cancel()
        await server.stop(grace=1.0)
        ray.kill(ray.get_runtime_context().current_actor)  # exit_actor is for calls of an actor


class ControllerHandle:
    """The controller as the process that started the cluster uses it. Calls block."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._run = actor.run.remote()
        self._started = actor.started.remote()

    def started(self, timeout_s: float) -> str:
        """Its address. Raises StartFailed, ProcessGone, or TimeoutError: then ask again."""
        return str(get(self._started, timeout_s))

    def hangs(self, timeout_s: float) -> bool:
        """Whether it gives no sign of life; that its process is gone is one."""
        answered, _ = ray.wait([self._actor.ping.remote()], timeout=timeout_s)
        return not answered

    def kill(self, restart: bool) -> None:
        """Ends its process, also one that hangs; Ray starts it again where `restart` says so."""
        kill_process(self._actor)
        if not restart:
            ray.kill(self._actor)

    def status(self, timeout_s: float = 10.0) -> bytes:
        """A serialized ClusterStatus."""
        answer = get(self._actor.status.remote(), timeout_s)
        assert isinstance(answer, bytes)
        return answer

    def credential(self, timeout_s: float = 10.0) -> bytes:
        """An operator's, as a file of it has it."""
        answer = get(self._actor.credential.remote(), timeout_s)
        assert isinstance(answer, bytes)
        return answer

    def probe_key(self, timeout_s: float = 10.0) -> str:
        """With which the cluster's gateways are tried."""
        return str(get(self._actor.probe_key.remote(), timeout_s))

    def ended(self, wait_s: float) -> bool:
        """Whether the cluster went down within `wait_s`. Ray may restart it meanwhile."""
        done, _ = ray.wait([self._run], timeout=wait_s)
        if not done:
            return False
        try:
            ray.get(self._run)
        except ray.exceptions.ActorUnavailableError:
            self._run = self._actor.run.remote()
            return False
        except RayActorError:
            return True
        return True

    def down(self, drain_s: float, timeout_s: float, hurry: Callable[[], bool]) -> None:
        """Ends the cluster; without waiting for its requests any more once `hurry` says so."""
        downs = [self._actor.down.remote(drain_s)]
        deadline = time.monotonic() + timeout_s
        while not self.ended(0.2):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not down within {timeout_s:g} s")
            if hurry() and len(downs) == 1:
                downs.append(self._actor.down.remote(0.0))


def start_controller(spec: ClusterSpec, local: bool) -> ControllerHandle:
    """Starts the control plane. `local`: all runs on this machine, reached over its loopback.

    Raises ConfigError when a cluster of this name runs already.
    """
    cluster, space = spec.metadata.name, namespace(spec.metadata.name)
    with contextlib.suppress(ValueError):
        ray.get_actor(CONTROLLER, namespace=space)
        message = f"{cluster!r} runs already in this Ray cluster; use `crossdock apply`"
        raise ConfigError("metadata.name", message)
    labels = dict(spec.controller.nodes.labels)
    placement = Placement(labels=labels, on_head=not labels, env={"OMP_NUM_THREADS": "1"})
    options = actor_options(CONTROLLER, space, placement)
    controller = ray.remote(ControllerActor).options(**options, max_restarts=-1)
    life, telemetry = secrets.token_hex(8), plain(spec.telemetry)
    return ControllerHandle(controller.remote(cluster, spec.to_yaml(), life, telemetry, local))
