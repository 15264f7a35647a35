"""`crossdock up`: one cluster in the foreground, from its YAML to the last process gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crossdock.deploy import credentials, processes
from crossdock.deploy.first_request import prove
from crossdock.deploy.home import crossdock_home
from crossdock.deploy.ray import control_plane, session
from crossdock.deploy.ray.mirror import GcsMirror
from crossdock.deploy.runtime import ProcessGone, StartFailed
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.spec_yaml import locate
from crossdock.deploy.store import ClusterStore
from crossdock.deploy.telemetry import event_listener, log_level
from crossdock.kvtransfer.shared_memory import cleanup_stale
from crossdock.model import store as models
from crossdock.model.text import load_text
from crossdock.proto.errors import ConfigError, ModelError, Unavailable
from crossdock.proto.settings import loopback_host, split_address
from crossdock.proto.v1 import admin_pb2

POLL_S = 0.25
WATCH_S = 1.0
HANG_S = 8.0  # without an answer: the controller hangs
HURRY_STOP_S = 15.0
LONGEST_SOCKET_FOLDER = 20  # Ray puts Unix sockets deep below it; their paths end at 107 bytes

Echo = Callable[[str], None]


def up(
    spec_path: str | Path,
    address: str | None = None,
    *,
    start_timeout_s: float = 600.0,
    echo: Echo = lambda line: print(line, flush=True),
) -> int:
    """Serves the cluster of a YAML file until SIGINT or SIGTERM; a second one hurries.

    `address` joins that Ray cluster (before ray.address of the file). Returns 0 after an orderly
    end, 130 when interrupted before it was ready. Raises ConfigError, ModelError or Unavailable
    when it can't start; whatever had been started is stopped by then.
    """
    with _signals() as came:
        cluster = Cluster(spec_path, address, echo=echo, interrupted=lambda: bool(came))
        try:
            cluster.start(start_timeout_s)
            cluster.watch(lambda: bool(came))
            return 0
        except Interrupted:
            return 130
        finally:
            cluster.stop(hurry=lambda: len(came) > 1)


class Interrupted(Exception):
    """A signal came before the cluster was ready."""


class Cluster:
    """A cluster that this process starts and ends. `start` and `stop` pair up, also on errors."""

    def __init__(
        self,
        spec_path: str | Path,
        address: str | None = None,
        *,
        echo: Echo = lambda line: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path = str(spec_path)
        self.spec = ClusterSpec.load(spec_path)
        self.ray_address = address or self.spec.ray.address
        self.grpc = self.http = ""  # set by start: where the first gateway is
        self.admin = ""  # and the controller
        self._echo = echo
        self._interrupted = interrupted
        self._began = time.monotonic()
        self._start_timeout_s = 0.0
        self._store = ClusterStore(self.spec.metadata.name)
        self._cleanup = contextlib.ExitStack()
        self._controller: control_plane.ControllerHandle | None = None
        self._model_name = next(iter(self.spec.models), Path(self.spec.model.id).stem.lower())

    def start(self, timeout_s: float = 600.0) -> None:
        """Returns when the cluster serves. Raises CrossdockError saying what failed and why."""
        self._began, self._start_timeout_s = time.monotonic(), timeout_s
        steps = (self._check_host, self._have_models, self._start_ray, self._start_controller)
        for step in steps:
            self._unless_interrupted()
            try:
                step()
            except ConfigError as error:
                raise error.at(self._where(error.field)) from None
        status = self._await_ready()
        for gateway in status.gateways:
            self._prove(gateway)
        self.grpc, self.http = status.gateways[0].grpc, status.gateways[0].http
        self._announce()

    def _check_host(self) -> None:
        """Before anything is started: is the environment sound, are the ports ours to take?"""
        log_level()
        event_listener()
        self._warn_of_open_doors()
        if self.ray_address:
            return
        self._cleanup.enter_context(self._store.locked())
        for field, address in self.spec.claims():
            try:
                _try_bind(*split_address(address))
            except OSError as error:
                message = f"cannot listen on {address}: {error.strerror}"
                raise ConfigError(field, message) from None

    def _warn_of_open_doors(self) -> None:
        """Whoever reaches a gateway on the network uses it, unless it asks for credentials, and
        those are read on the way, unless they travel by TLS."""
        doors = {"gateway.grpc": self.spec.gateway.grpc, "gateway.http": self.spec.gateway.http}
        wide = [door for door, to in doors.items() if not loopback_host(split_address(to)[0])]
        if not wide:
            return
        where = f"{self._where(wide[0])}: {' and '.join(wide)}"
        if not self.spec.auth.required:
            self._say(f"warning: {where}: other hosts reach it, and `auth` asks nobody for a key")
        if not self.spec.gateway.tls:
            self._say(f"warning: {where}: without gateway.tls all of it can be read on the way")

    def _have_models(self) -> None:
        home = crossdock_home()
        if self.ray_address:
            return  # each node finds its own
        for field, model_id in self.spec.sources.items():
            try:
                if model_id in models.KNOWN_MODELS:
                    models.fetch(model_id, home, progress=self._say)
                found = models.resolve(model_id, home, self.spec.any_family(field))
                load_text(found)  # shape, tokenizer and chat template: whatever is not supported
            except ModelError as error:
                raise ModelError(f"{self._where(field)}: {field}: {error}") from None
            if not self.spec.models:
                self._model_name = found.model_id

    def _start_ray(self) -> None:
        folder = ""
        if self.ray_address:
            self._say(f"joining Ray at {self.ray_address}")
            if token := session.open_token():
                self._say(f"warning: others can read Ray's token: chmod 600 {token}")
        else:
            self._say("starting Ray")
            processes.keep_orphans()
            folder = _temp_folder()
            self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        self._cleanup.callback(session.stop_ray if self.ray_address else self._stop_local_ray)
        session.start_ray(self.ray_address, self.spec.ray.object_store_mb, folder)

    def _start_controller(self) -> None:
        self._say("starting the controller")
        local = not self.ray_address
        self._controller = control_plane.start_controller(self.spec, local)
        store = ClusterStore(self.spec.metadata.name, mirror=GcsMirror(self.spec.metadata.name))
        self._cleanup.callback(store.end)
        self._cleanup.callback(self._down, 0.0)
        for _ in self._turns():
            try:
                self.admin = self._controller.started(POLL_S)
                self._have_credential()
                return
            except TimeoutError:
                self._in_time("the controller")
            except (StartFailed, ProcessGone) as error:
                raise Unavailable(f"the controller did not start: {error}") from None

    def _have_credential(self) -> None:
        """The operator's, also on a machine that is not the controller's, which keeps its own."""
        if self._controller is not None and self.ray_address and credentials.wanted(self._store):
            self._store.save(credentials.FILE, self._controller.credential())

    def _await_ready(self) -> admin_pb2.ClusterStatus:
        shown: dict[str, str] = {}
        for _ in self._turns():
            status = self.status()
            self._show_progress(status, shown)
            if status.converged:
                break
            self._in_time(*(name for name, state in shown.items() if state != "ready"))
            time.sleep(POLL_S)
        return status

    def _turns(self) -> Iterator[None]:
        """Turns of a wait for the cluster, which a signal or the loss of Ray ends."""
        while True:
            self._unless_interrupted()
            self._check_ray()
            yield

    def _in_time(self, *waiting: str) -> None:
        if time.monotonic() - self._began > self._start_timeout_s:
            after = f"not ready after {self._start_timeout_s:g} s"
            raise Unavailable(f"{after}; waited for {', '.join(waiting)}")

    def _prove(self, gateway: admin_pb2.GatewayStatus) -> None:
        """A first request to each model is served by this gateway."""
        assert self._controller is not None, "not started"
        key = self._controller.probe_key() if self.spec.auth.required else ""
        operator = None
        if self.spec.gateway.tls:
            operator = credentials.read(self._store.folder / credentials.FILE).identity
        for model in self.spec.models or [""]:
            prove(gateway, key, operator, self._unless_interrupted, model)

    def _show_progress(self, status: admin_pb2.ClusterStatus, shown: dict[str, str]) -> None:
        members: list[admin_pb2.GatewayStatus | admin_pb2.MemberStatus] = [*status.gateways]
        for member in [*members, *status.workers]:
            if member.state == "lost" or member.restarts:
                raise Unavailable(f"{member.name} did not start: {member.error or 'it was lost'}")
            state = f"{member.state} ({member.error})" if member.error else member.state
            if shown.get(member.name) != state:
                shown[member.name] = state
                self._say(f"{member.name} {state}")

    def _announce(self) -> None:
        self._echo(f"READY grpc={self.grpc} http={self.http}")
        for line in how_to_ask(self.spec, self.grpc, self.http, self._model_name):
            self._echo(f"  {line}")

    def status(self) -> admin_pb2.ClusterStatus:
        """Raises Unavailable when the controller is gone."""
        assert self._controller is not None, "not started"
        try:
            return admin_pb2.ClusterStatus.FromString(self._controller.status())
        except (ProcessGone, StartFailed, TimeoutError) as error:
            raise Unavailable(f"the controller does not answer: {error}") from None

    def watch(self, interrupted: Callable[[], bool]) -> None:
        """Shows decisions as they are made, until interrupted or brought down by another."""
        assert self._controller is not None, "not started"
        seen = time.time()
        while not interrupted() and not self._controller.ended(WATCH_S):
            self._check_ray()
            if self._controller.hangs(HANG_S):
                self._say("the controller hangs: its process is ended, and Ray starts it again")
                self._controller.kill(restart=True)
            with contextlib.suppress(Unavailable):  # Ray restarts it
                decisions = self.status().decisions
                self._have_credential()
                for decision in decisions:
                    if decision.unix_s > seen:
                        seen = decision.unix_s
                        self._say(f"{decision.action}: {decision.reason}")
        self._check_ray()  # without it the controller ends as well

    def _check_ray(self) -> None:
        """Ends everything where a process of our own Ray is gone: what it ran would go on without
        anybody to watch it. Raises Unavailable."""
        if problem := session.lost_ray_process():
            self._say(f"{problem}: ending the cluster")
            self._controller = None
            processes.end_all(processes.descendants(os.getpid()), grace_s=0.0)
            raise Unavailable(f"{problem}, and the cluster with it; start it again")

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends every process of the cluster; requests may finish for gateway.drain_s."""
        if self._controller is not None and self.grpc:
            self._say("stopping")
            self._down(0.0 if hurry() else self.spec.gateway.drain_s, hurry)
        self.grpc = self.http = ""
        self._cleanup.close()

    def _down(self, drain_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        controller, self._controller = self._controller, None
        if controller is None:
            return
        try:
            controller.down(drain_s, drain_s + (HURRY_STOP_S if self.admin else 5.0), hurry)
        except (ProcessGone, StartFailed, TimeoutError) as error:
            self._say(f"the controller did not end in order ({error}); ending its processes")
            if not self.admin:  # it waits for a node, and would start on the next one
                controller.kill(restart=False)

    def _stop_local_ray(self) -> None:
        """Ray ends its processes on a shutdown; those that outlive it are killed."""
        ours = processes.descendants(os.getpid())
        session.stop_ray()
        processes.end_all(ours, grace_s=5.0)
        cleanup_stale()  # shared memory of workers that were killed

    def _unless_interrupted(self) -> None:
        if self._interrupted():
            raise Interrupted

    def _where(self, field: str) -> str:
        return locate(Path(self.path).read_text(encoding="utf-8"), self.path, field)

    def _say(self, line: str) -> None:
        self._echo(f"[{time.monotonic() - self._began:5.1f} s] {line}")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come, instead of dying of them."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _try_bind(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)


def _temp_folder() -> str:
    """For this user alone, and so is all that is put below it."""
    base = tempfile.gettempdir()
    if len(base) > LONGEST_SOCKET_FOLDER:
        base = "/tmp"
    return tempfile.mkdtemp(prefix="crossdock-", dir=base)


def how_to_ask(spec: ClusterSpec, grpc: str, http: str, model: str) -> list[str]:
    """Lines for a shell: a first chat through each door of a cluster."""
    scheme, ca = ("https", " --cacert CA.pem") if spec.gateway.tls else ("http", "")
    lines, credential = [], ""
    if spec.auth.required:
        lines.append("export CROSSDOCK_API_KEY=…  # a bearer token, or from crossdock keys new")
        credential = ' -H "Authorization: Bearer $CROSSDOCK_API_KEY"'
    lines.append(
        f"curl{ca} {scheme}://{http}/v1/chat/completions{credential} "
        f"-H 'Content-Type: application/json' "
        f'-d \'{{"model": "{model}", "temperature": 0, "messages": '
        '[{"role": "user", "content": "What is the capital of France?"}]}\''
    )
    lines.append(
        f"crossdock generate --address {grpc}{ca.replace('cacert', 'ca')} "
        '--chat --temperature 0 "What is the capital of France?"'
    )
    return lines
