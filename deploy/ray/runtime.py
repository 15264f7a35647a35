"""Processes as the controller starts and finds them: actors that outlive it, placed by Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from crossdock.deploy.home import HOME, crossdock_home
from crossdock.deploy.listening import Listening, listening
from crossdock.deploy.ray.calls import CRASHES, KILL_S, call, kill_process
from crossdock.deploy.ray.member import MemberActor
from crossdock.deploy.ray.node import pids_here
from crossdock.deploy.runtime import (
    CannotStart,
    Launch,
    Membership,
    Placement,
    Process,
    ProcessGone,
    Started,
    StartFailed,
)
from crossdock.deploy.telemetry import EVENT_LISTENER
from crossdock.router.dispatch.traffic import Traffic

HEAD_RESOURCE = "node:__internal_head__"
MANY_CALLS = 1000
MB = 1 << 20
PASSED_ON = (HOME, "CROSSDOCK_LOG", "GRPC_VERBOSITY", EVENT_LISTENER, CRASHES)


class RayProcess:
    """A MemberActor as the controller handles it; see Process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def request_certificate(self) -> bytes:
        return await call(self._actor.request_certificate.remote())

    async def certify(self, certificate: bytes, authority: bytes) -> None:
        await call(self._actor.certify.remote(certificate, authority))

    async def start(self) -> Started:
        return await call(self._actor.start.remote())

    async def gone(self) -> str:
        """Pends until its process has ended; says how."""
        try:
            return str(await call(self._actor.run.remote()))
        except ProcessGone as error:
            return str(error)

    async def update(self, members: Membership) -> None:
        await call(self._actor.update.remote(members))

    async def drain(self, timeout_s: float, stays: bool = False) -> bool:
        return await call(self._actor.drain.remote(timeout_s, stays))

    async def become(self, launch: Launch) -> Started:
        return await call(self._actor.become.remote(launch))

    async def active_requests(self) -> int:
        return await call(self._actor.active_requests.remote())

    async def traffic(self) -> Mapping[str, Traffic]:
        return await call(self._actor.traffic.remote())

    async def explain(self, request_id: str) -> bytes:
        return await call(self._actor.explain.remote(request_id))

    async def listening(self) -> Sequence[Listening]:
        return await call(self._actor.listening.remote())

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stops it, with SIGKILL after `grace_s` seconds, and waits until it is gone."""
        try:
            async with asyncio.timeout(grace_s):
                await call(self._actor.stop.remote())
        except (TimeoutError, ProcessGone, StartFailed):
            await asyncio.to_thread(kill_process, self._actor)
        with contextlib.suppress(RayActorError, ValueError):
            ray.kill(self._actor)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_S):
                await self.gone()


class RayRuntime:
    """Runtime over the Ray cluster that this process is part of."""

    def __init__(self, cluster: str, local: bool) -> None:
        self._namespace = namespace(cluster)
        self.local = local
        self._host = "127.0.0.1" if local else ""

    def listening(self) -> tuple[str, Sequence[Listening]]:
        """As Runtime."""
        return ray.get_runtime_context().get_node_id(), listening(pids_here(self.local))

    async def launch(self, launch: Launch) -> Process:
        """Asks Ray for a process, which may wait for a place. Raises CannotStart."""
        launch = dataclasses.replace(launch, host=self._host)
        # A name of its own for each launch: Ray frees a name only some time after its actor.
        name = f"member/{launch.name}/{secrets.token_hex(4)}"
        options = actor_options(name, self._namespace, launch.placement)
        try:
            actor = ray.remote(MemberActor).options(**options, max_restarts=0).remote(launch)
        except (ValueError, TypeError) as error:
            raise CannotStart(f"Ray refuses it: {error}") from None
        return RayProcess(actor)

    async def adopt(self) -> Sequence[tuple[Launch, Process]]:
        """The members that an earlier controller launched; those that do not answer are ended."""
        found: list[tuple[Launch, Process]] = []
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self._namespace and entry["name"].startswith("member/"):
                with contextlib.suppress(ValueError, ProcessGone):
                    actor = ray.get_actor(entry["name"], namespace=self._namespace)
                    try:
                        async with asyncio.timeout(10.0):
                            launch: Launch = await call(actor.launch.remote())
                    except TimeoutError:  # not placed yet, or hung: nobody would watch it
                        await RayProcess(actor).stop(grace_s=0.0)
                    else:
                        found.append((launch, RayProcess(actor)))
        return found

    def why_waiting(self, launch: Launch) -> str:
        """Why Ray cannot place it now, empty where it can."""
        return placement_problem(launch.placement, ray.nodes())


def placement_problem(placement: Placement, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Why no node can ever take a process, empty when one can. `nodes` as ray.nodes() has them."""
    alive = [node for node in nodes if node["Alive"]]
    if placement.labels:
        wanted = placement.labels.items()
        alive = [node for node in alive if wanted <= node.get("Labels", {}).items()]
        if not alive:
            labels = ", ".join(f"{key}={value}" for key, value in wanted)
            return f"no node of the Ray cluster has the labels {labels}"
    for resource, amount in _resources(placement).items():
        most = max((node["Resources"].get(resource, 0.0) for node in alive), default=0.0)
        if most < amount:
            unit = "MB " if resource == "memory" else ""
            amount, most = (amount / MB, most // MB) if unit else (amount, most)
            return f"no fitting node has {amount:.9g} {unit}of {resource}; the most is {most:.9g}"
    return ""


def namespace(cluster: str) -> str:
    """Ray's name for everything of this cluster."""
    return f"crossdock-{cluster}"


def _resources(placement: Placement) -> dict[str, float]:
    wanted = {"CPU": placement.cpus, "GPU": placement.gpus, **placement.custom}
    wanted["memory"] = placement.memory_mb * MB
    return {name: amount for name, amount in wanted.items() if amount}


def actor_options(name: str, namespace: str, placement: Placement) -> dict[str, Any]:
    """Options of an actor that outlives whoever starts it, for the next controller to find."""
    custom = dict(placement.custom)
    if placement.on_head:
        custom[HEAD_RESOURCE] = 0.001
    env = {"GRPC_VERBOSITY": "ERROR"}  # not a line for each handshake that was refused
    env |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if HOME in env:
        env[HOME] = str(crossdock_home())  # absolute: another process has another working folder
    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",
        "max_concurrency": MANY_CALLS,
        "num_cpus": placement.cpus,
        "num_gpus": placement.gpus,
        "resources": custom,
        "runtime_env": {"env_vars": {**env, **placement.env}},
    }
    if placement.memory_mb:
        options["memory"] = placement.memory_mb * MB
    if placement.labels:
        options["label_selector"] = dict(placement.labels)
    return options
