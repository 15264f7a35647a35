"""The only file that speaks to Ray: actors around workers, gateways and the controller."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from crossdock.deploy import ray_environment  # isort: skip  # noqa: F401  (before ray)
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crossdock.deploy import processes
from crossdock.deploy import telemetry as traces
from crossdock.deploy.runtime import (
    CannotStart,
    Launch,
    Placement,
    Process,
    ProcessGone,
    Started,
    StartFailed,
)
from crossdock.deploy.store import ClusterStore
from crossdock.proto import events
from crossdock.proto.errors import ConfigError, CrossdockError, ModelError, Unavailable
from crossdock.proto.types import Role, WorkerEndpoint

log = logging.getLogger(__name__)
T = TypeVar("T")

CONTROLLER = "controller"
HEAD_RESOURCE = "node:__internal_head__"
MANY_CALLS = 1000
MB = 1 << 20
LOCAL_CPUS = 1024.0  # a local Ray counts workers' cpus but never refuses one for want of them
CONNECT_S = 5.0  # for a gateway to reach the workers that it was told of
KILL_S = 5.0  # for Ray to notice that a process is gone
VITAL = ("gcs_server", "raylet")  # of Ray's own processes: no cluster without them
CRASHES = "CROSSDOCK_CRASHES"  # the folder where a process that crashes leaves why
PASSED_ON = ("CROSSDOCK_HOME", "CROSSDOCK_LOG", traces.EVENT_LISTENER, CRASHES)


class MemberActor:
    """One worker or gateway process. Lives until it is stopped or killed."""

    def __init__(self, launch: Launch) -> None:
        _set_up_process(launch.name, launch.telemetry)
        with contextlib.suppress(KeyError, OSError):  # on another host than the controller's
            processes.record_crashes(os.environ[CRASHES])
        self._launch = launch
        self._server: Any = None
        self._starting = asyncio.Lock()
        self._started: Started | None = None
        self._stopped = asyncio.Event()

    async def start(self) -> Started:
        async with self._starting:
            if self._started is None:
                try:
                    self._started = await self._start()
                except CrossdockError as error:
                    settled = isinstance(error, (ConfigError, ModelError))
                    failed = CannotStart if settled else StartFailed
                    raise failed(f"{type(error).__name__}: {error}") from None
            return self._started

    async def launch(self) -> Launch:
        return self._launch

    async def run(self) -> str:
        """Pends as long as the process lives: its end is noticed by whoever awaits this."""
        await self._stopped.wait()
        return "stopped"

    async def update(self, endpoints: Sequence[WorkerEndpoint]) -> None:
        if self._launch.gateway is None:
            await self._server.update_peers(list(endpoints))
            return
        await self._server.update_members(list(endpoints))
        if _can_serve(endpoints):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_S):
                    while not self._server.ready:
                        await asyncio.sleep(0.02)

    async def drain(self, timeout_s: float) -> bool:
        return bool(await self._server.drain(timeout_s))

    async def active_requests(self) -> int:
        return int(self._server.active_requests) if self._started else 0

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
        traces.flush()
        self._stopped.set()

    async def _start(self) -> Started:
        context = ray.get_runtime_context()
        launch, node_id = self._launch, context.get_node_id()
        # Imported here, in the actor: the controller and the driver need no torch.
        if launch.worker is not None:
            config = dataclasses.replace(
                launch.worker, host=launch.host or _host(), node_id=node_id
            )
            if launch.role == "prefill":
                from crossdock.prefill.role import create
            else:
                from crossdock.decode.role import create
            self._server = create(config)
            endpoint = await self._server.start()
            return Started(os.getpid(), node_id, endpoint=endpoint)
        from crossdock.router.dispatch.metrics import Slo
        from crossdock.router.gateway import GatewayConfig, GatewayServer

        assert launch.gateway is not None
        slo = Slo(**launch.gateway["slo"])
        self._server = GatewayServer(GatewayConfig(**{**launch.gateway, "slo": slo}))
        await self._server.start()
        grpc, http = self._server.grpc_address, self._server.http_address
        return Started(os.getpid(), node_id, grpc=grpc, http=http)


class ControllerActor:
    """The control plane's process. Ray restarts it; the spec on disk and the actors outlive it."""

    def __init__(
        self,
        cluster: str,
        yaml: str,
        life: str,
        telemetry: Mapping[str, str] | None,
        local: bool,
    ) -> None:
        _set_up_process(CONTROLLER, telemetry)
        os.environ[CRASHES] = str(ClusterStore(cluster).folder)
        self._cluster, self._yaml, self._life = cluster, yaml, life
        self._local = local
        self._failed = ""
        self._controller: Any = None
        self._started = asyncio.Event()
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

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
        status = await cluster_status(self._controller)
        return status.SerializeToString()

    async def ping(self) -> None:
        """Answers while its loop turns."""

    async def run(self) -> None:
        """Pends as long as the process lives, which is until the cluster is down."""
        await asyncio.Event().wait()

    async def down(self, drain_s: float) -> None:
        await self._started.wait()
        if self._controller is not None:
            await self._controller.down(drain_s)
        else:
            ray.actor.exit_actor()

    async def _run(self) -> None:
        from crossdock.deploy.admin_service import serve_admin
        from crossdock.deploy.controller import Controller

        try:
            store = ClusterStore(self._cluster)
            store.begin(self._yaml, self._life)  # a restarted controller goes on with what is there
            controller = Controller(RayRuntime(self._cluster, self._local), store)
            server, self._address = await serve_admin(controller, controller.spec.controller.grpc)
        except Exception as error:
            log.exception("the controller cannot start")
            self._failed = f"{type(error).__name__}: {error}"
            self._started.set()
            return
        self._controller = controller
        self._started.set()
        await controller.run()
        await controller.ended.wait()
        await server.stop(grace=1.0)
        ray.kill(ray.get_runtime_context().current_actor)  # exit_actor is for calls of an actor


class RayProcess:
    """A MemberActor as the controller handles it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def start(self) -> Started:
        return await _call(self._actor.start.remote())

    async def gone(self) -> str:
        try:
            return str(await _call(self._actor.run.remote()))
        except ProcessGone as error:
            return str(error)

    async def update(self, endpoints: Sequence[WorkerEndpoint]) -> None:
        await _call(self._actor.update.remote(list(endpoints)))

    async def drain(self, timeout_s: float) -> bool:
        return await _call(self._actor.drain.remote(timeout_s))

    async def active_requests(self) -> int:
        return await _call(self._actor.active_requests.remote())

    async def stop(self, grace_s: float = 5.0) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await _call(self._actor.stop.remote())
        except (TimeoutError, ProcessGone, StartFailed):
            await asyncio.to_thread(_kill_process, self._actor)
        with contextlib.suppress(RayActorError, ValueError):
            ray.kill(self._actor)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_S):
                await self.gone()


class RayRuntime:
    """Runtime over the Ray cluster that this process is part of."""

    def __init__(self, cluster: str, local: bool) -> None:
        self._namespace = namespace(cluster)
        self._host = "127.0.0.1" if local else ""

    async def launch(self, launch: Launch) -> Process:
        launch = dataclasses.replace(launch, host=self._host)
        # A name of its own for each launch: Ray frees a name only some time after its actor.
        name = f"member/{launch.name}/{secrets.token_hex(4)}"
        member = ray.remote(MemberActor)
        try:
            actor = member.options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",  # it outlives this controller; the next one adopts it
                max_restarts=0,
                max_concurrency=MANY_CALLS,
                **_placed(launch.placement),
            ).remote(launch)
        except (ValueError, TypeError) as error:
            raise CannotStart(f"Ray refuses it: {error}") from None
        return RayProcess(actor)

    async def adopt(self) -> Sequence[tuple[Launch, Process]]:
        found: list[tuple[Launch, Process]] = []
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self._namespace and entry["name"].startswith("member/"):
                with contextlib.suppress(ValueError, ProcessGone):
                    actor = ray.get_actor(entry["name"], namespace=self._namespace)
                    try:
                        async with asyncio.timeout(10.0):
                            launch: Launch = await _call(actor.launch.remote())
                    except TimeoutError:  # not placed yet, or hung: nobody would watch it
                        await RayProcess(actor).stop(grace_s=0.0)
                    else:
                        found.append((launch, RayProcess(actor)))
        return found

    def why_waiting(self, launch: Launch) -> str:
        nodes = ray.nodes()
        return placement_problem(launch.placement, nodes)


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


def start_ray(address: str, object_store_mb: int, temp_dir: str, verbose: bool = False) -> None:
    """Joins the Ray cluster at `address`, or starts one on this machine under `temp_dir`.

    Raises Unavailable when it can't be joined, or can't write to the home folder.
    """
    local: dict[str, Any] = {
        "num_cpus": int(LOCAL_CPUS),
        "include_dashboard": False,
        "object_store_memory": object_store_mb << 20,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": temp_dir,
    }
    options = {} if address else local
    try:
        with _own_sigterm():
            ray.init(
                address or "local", log_to_driver=verbose, logging_level=logging.ERROR, **options
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        doing = f"join {address!r}" if address else "start a local Ray"
        raise Unavailable(f"ray.address: cannot {doing}: {error}") from None
    except OSError as error:
        hint = "it keeps its token in ~/.ray: set HOME to a folder that can be written"
        raise Unavailable(f"Ray cannot start: {error}; {hint}") from None


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init takes SIGTERM for itself; it is given back to who had it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def stop_ray() -> None:
    """Leaves the Ray cluster; one that `start_ray` started ends."""
    ray.shutdown()


def lost_ray_process() -> str:
    """Which vital process of the Ray that `start_ray` started has ended and how; empty while all
    run, and for a Ray that was joined."""
    node = ray._private.worker._global_node
    dead: list[tuple[str, Any]] = node.dead_processes() if node is not None else []
    for kind, process in dead:
        if kind in VITAL:
            code: int = process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"Ray's {kind} ended ({how})"
    return ""


class ControllerHandle:
    """The controller as the process that started the cluster uses it. Calls block."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._run = actor.run.remote()
        self._started = actor.started.remote()

    def started(self, timeout_s: float) -> str:
        """Its address. Raises StartFailed, ProcessGone, or TimeoutError: then it may be asked
        again."""
        return str(_get(self._started, timeout_s))

    def hangs(self, timeout_s: float) -> bool:
        """Whether it gives no sign of life; that its process is gone is one."""
        answered, _ = ray.wait([self._actor.ping.remote()], timeout=timeout_s)
        return not answered

    def kill(self, restart: bool) -> None:
        """Ends its process, also one that hangs; Ray starts it again where `restart` says so."""
        _kill_process(self._actor)
        if not restart:
            ray.kill(self._actor)

    def status(self, timeout_s: float = 10.0) -> bytes:
        """A serialized ClusterStatus."""
        answer = _get(self._actor.status.remote(), timeout_s)
        assert isinstance(answer, bytes)
        return answer

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


def start_controller(
    cluster: str, yaml: str, telemetry: Mapping[str, str] | None, local: bool
) -> ControllerHandle:
    """Starts the control plane for the spec in `yaml`.

    `local`: all runs on this machine and is reached over its loopback.
    Raises ConfigError when a cluster of this name runs already.
    """
    space = namespace(cluster)
    with contextlib.suppress(ValueError):
        ray.get_actor(CONTROLLER, namespace=space)
        message = f"{cluster!r} runs already in this Ray cluster; use `crossdock apply`"
        raise ConfigError("metadata.name", message)
    actor = (
        ray.remote(ControllerActor)
        .options(
            name=CONTROLLER,
            namespace=space,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=MANY_CALLS,
            **_placed(Placement(on_head=True, env={"OMP_NUM_THREADS": "1"})),
        )
        .remote(cluster, yaml, secrets.token_hex(8), telemetry, local)
    )
    return ControllerHandle(actor)


def _kill_process(actor: Any) -> None:
    """SIGKILL to an actor's process, on whichever node: one that hangs does not hear ray.kill,
    after which Ray takes it for dead all the same. Blocks for up to KILL_S."""
    entry: Mapping[str, Any] = {}
    with contextlib.suppress(RayError):
        entry = ray._private.state.actors(actor._actor_id.hex())
    if entry.get("State") != "ALIVE":
        return
    pid, node = entry["Pid"], entry["Address"]["NodeID"]
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
    else:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        killed = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(pid)
        ray.wait([killed], timeout=KILL_S)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def namespace(cluster: str) -> str:
    return f"crossdock-{cluster}"


def _resources(placement: Placement) -> dict[str, float]:
    wanted = {"CPU": placement.cpus, "GPU": placement.gpus, **placement.custom}
    wanted["memory"] = placement.memory_mb * MB
    return {name: amount for name, amount in wanted.items() if amount}


def _placed(placement: Placement) -> dict[str, Any]:
    """A placement as actor options."""
    custom = dict(placement.custom)
    if placement.on_head:
        custom[HEAD_RESOURCE] = 0.001
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    options: dict[str, Any] = {
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


def _can_serve(endpoints: Sequence[WorkerEndpoint]) -> bool:
    roles = {endpoint.role for endpoint in endpoints}
    return Role.COLOCATED in roles or {Role.PREFILL, Role.DECODE} <= roles


def _host() -> str:
    """The address at which other nodes reach this one."""
    return str(ray.util.get_node_ip_address())


def _set_up_process(name: str, telemetry: Mapping[str, str] | None) -> None:
    logging.basicConfig(
        level=traces.log_level(), format=f"%(asctime)s {name} %(levelname)s %(message)s"
    )
    events.listen(traces.event_listener())
    traces.configure(telemetry, f"crossdock.{name.rpartition('-')[0] or name}", name)


async def _call(reference: Awaitable[T]) -> T:
    with _translated():
        return await reference


def _get(reference: Any, timeout_s: float) -> object:
    with _translated():
        return ray.get(reference, timeout=timeout_s)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's errors as StartFailed, ProcessGone and TimeoutError."""
    try:
        yield
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError("no answer in time") from None
    except RayActorError as error:
        raise ProcessGone(_end_of(error)) from None
    except RayTaskError as error:
        raise _cause(error) from None
    except RayError as error:  # out of memory, unschedulable, broken environment
        raise ProcessGone(str(error)) from None


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    if isinstance(cause, StartFailed):
        return type(cause)(str(cause))
    return StartFailed(f"{type(cause).__name__}: {cause}")


def _end_of(error: RayActorError) -> str:
    """The part of Ray's message that says how the process ended."""
    text = " ".join(str(error).split())
    died = re.search(r"exit type: (\w+) .*?exit detail: (.*?)\.?( Some common causes|$)", text)
    if died:
        pid = re.search(r"\bpid: (\d+)", text) if "connection error" in died[2] else None
        by = processes.fatal_signal(int(pid[1]), os.environ.get(CRASHES, "")) if pid else ""
        return f"its process died ({by or f'{died[1]}: {died[2]}'})"
    because = re.search(r"The actor is dead because (.*)", text)
    return because[1] if because else text[:300]
