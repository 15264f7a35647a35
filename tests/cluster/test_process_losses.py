"""What a cluster does when one of its processes, or of Ray's, ends or hangs: on a real Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from freeze import freeze
from ray_kit import (
    PROMPT,
    UP,
    answers_after,
    is_controller,
    leave,
    serving,
    temp_folders,
    until,
    worker_of,
    write_spec,
)

from crossdock.client import Client
from crossdock.deploy import admin, processes
from crossdock.deploy.store import ClusterStore
from crossdock.deploy.up import Cluster, up
from crossdock.proto.errors import ConfigError, Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def own_spec(tmp_path, tiny_model) -> Path:
    return write_spec(tmp_path / "own.yaml", tiny_model, name="-losses")


class Up:
    """`crossdock up` in a process of its own, and what it has printed."""

    def __init__(self, path: Path, **environment: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", UP, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))

    def __enter__(self) -> Up:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            left = processes.descendants(self.process.pid)
            self.process.terminate()
            processes.end_all(left, grace_s=30.0)
            self.process.kill()
        self.process.wait(20)
        self._reader.join(20)
        self.process.stdout.close()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def ready(self) -> tuple[str, str]:
        """The addresses of its gateway, gRPC and HTTP."""
        ended = self.process.poll
        until(lambda: "READY" in self.output or ended() is not None, 120, "READY")
        found = re.search(r"READY grpc=(\S+) http=(\S+)", self.output)
        assert found, self.output
        return found[1], found[2]


# -- Ray's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_when_a_process_of_ray_ends_up_says_so_and_leaves_nothing(own_spec, victim):
    with Up(own_spec) as running:
        running.ready()
        ours = processes.descendants(running.process.pid)
        folders = {part for p in ours for part in temp_folders(p.pid)}
        [pid] = [p.pid for p in ours if name_of(p.pid) == victim]
        store = ClusterStore(f"test-losses-{os.getpid()}")
        assert store.folder.exists() and folders
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        said = f"Ray's {victim} ended (SIGKILL)"
        until(lambda: said in running.output, 10, "it is said")
        until(lambda: not any(is_member(p.pid) for p in ours), 10, "nobody serves unsupervised")
        assert time.monotonic() - killed < 10
        assert running.process.wait(30) not in (0, -signal.SIGKILL), running.output
    assert "and the cluster with it" in running.output
    assert not [p for p in ours if processes.alive(p)]
    assert not [folder for folder in folders if Path(folder).exists()]
    assert not store.folder.exists(), "its key stays"


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def is_member(pid: int) -> bool:
    try:
        return b"MemberActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# -- proxies -----------------------------------------------------------------------------------


def test_a_cluster_behind_a_proxy_serves(own_spec):
    """http_proxy is about the world outside: nothing of the cluster's own goes there."""
    dead = "http://127.0.0.1:1"
    with Up(own_spec, http_proxy=dead, https_proxy=dead, grpc_proxy=dead) as running:
        address, _ = running.ready()
        with Client(address) as client:
            assert len(client.generate(PROMPT, max_tokens=4, ignore_eos=True).token_ids) == 4


def test_ready_means_that_tokens_came_out(own_spec, monkeypatch):
    """Workers that are connected and compute nothing are no cluster that serves."""
    monkeypatch.setattr("crossdock.deploy.first_request.FIRST_TOKENS_S", 3.0)
    said: list[str] = []
    cluster = Cluster(own_spec, echo=said.append)
    announce, status = cluster._await_ready, cluster.status

    def hang(*arguments):
        found = announce(*arguments)
        [decode] = [w for w in status().workers if w.pool == "decode"]
        freeze(decode.pid)
        return found

    monkeypatch.setattr(cluster, "_await_ready", hang)
    try:
        with pytest.raises(Unavailable, match=r"gateway-0 at \S+ served no token: DEADLINE"):
            cluster.start(120)
    finally:
        cluster.stop()
    assert not any("READY" in line for line in said)


# -- a Ray that was joined ----------------------------------------------------------------------


@pytest.fixture
def other_ray():
    """A Ray that somebody else started."""
    from ray.cluster_utils import Cluster as RayCluster

    nodes = RayCluster()
    nodes.add_node(num_cpus=4, object_store_memory=80 << 20, include_dashboard=False)
    try:
        yield nodes.address
    finally:
        nodes.shutdown()


def test_a_name_is_free_again_after_down_on_a_joined_ray(own_spec, other_ray):
    """Also where whoever started the cluster left it, and nobody calls its controller any more."""
    left = Cluster(own_spec, other_ray)
    try:
        left.start(120)
    except BaseException:
        left.stop()
        raise
    address = left.admin
    leave(left)
    admin.down(address, drain_s=0)
    again = Cluster(own_spec, other_ray)
    try:
        again.start(120)
    finally:
        again.stop()


# -- those that hang ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_model):
    path = write_spec(tmp_path_factory.mktemp("hang") / "hang.yaml", tiny_model, name="-hang")
    with serving(path, timeout_s=120) as cluster:
        yield cluster


def answer(cluster: Cluster, salt: int, into: list[object]) -> None:
    """The tokens of a stream that takes a while, or its error."""
    try:
        with Client(cluster.grpc) as client:
            chunks = client.stream(
                [7 + salt, *PROMPT], max_tokens=300, temperature=0, ignore_eos=True, timeout=100
            )
            into.append([token for chunk in chunks for token in chunk.token_ids])
    except Exception as error:
        into.append(error)


def test_a_hung_sole_worker_is_replaced_under_its_streams(cluster):
    calm: list[object] = []
    for salt in range(4):
        answer(cluster, salt, calm)
    victim = worker_of(cluster, "decode")
    streams: list[list[object]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=answer, args=(cluster, i, streams[i])) for i in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: worker_of(cluster, "decode").worker.load.running == 4, 30, "all are decoded")
    os.kill(victim.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: not Path(f"/proc/{victim.pid}").exists(), 20, "it is found and ended")
    print(f"found and ended after {time.monotonic() - stopped:.1f} s")
    for thread in threads:
        thread.join(100)
    print(f"all streams ended after {time.monotonic() - stopped:.1f} s")
    assert [tokens for [tokens] in streams] == calm
    assert worker_of(cluster, "decode").restarts == 1


def test_a_hung_gateway_is_replaced_once(cluster):
    [victim] = admin.status(cluster.admin).gateways
    os.kill(victim.pid, signal.SIGSTOP)
    stopped = time.monotonic()

    def successor():
        found = [g for g in admin.status(cluster.admin).gateways if g.pid != victim.pid]
        return found if found and found[0].state == "ready" else None

    [gateway] = until(successor, 25, "another serves")
    print(f"another gateway after {time.monotonic() - stopped:.1f} s")
    assert gateway.restarts == 1, "a start failed"
    until(lambda: admin.status(cluster.admin).converged, 20, "the cluster is whole")
    decisions = [d for d in admin.status(cluster.admin).decisions if "gateway" in d.action]
    assert "did not answer" in decisions[-2].reason, decisions
    with Client(gateway.grpc) as client:
        assert len(client.generate(PROMPT, max_tokens=2, ignore_eos=True).token_ids) == 2


def test_a_hung_controller_is_replaced(cluster):
    [pid] = [p.pid for p in processes.descendants(os.getpid()) if is_controller(p.pid)]
    before = {w.name: w.pid for w in admin.status(cluster.admin).workers}
    over = threading.Event()
    watching = threading.Thread(target=cluster.watch, args=(over.is_set,))
    watching.start()
    try:
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: answers_after(cluster, pid), 40, "another answers")
        print(f"another controller after {time.monotonic() - stopped:.1f} s")
    finally:
        over.set()
        watching.join(30)
    assert {w.name: w.pid for w in admin.status(cluster.admin).workers} == before


# -- start and end -----------------------------------------------------------------------------


def test_an_unknown_log_level_is_named_before_anything_starts(own_spec, monkeypatch):
    monkeypatch.setenv("CROSSDOCK_LOG", "verbose")
    with pytest.raises(ConfigError, match="CROSSDOCK_LOG: 'verbose' is not allowed; one of debug"):
        up(own_spec, echo=lambda line: pytest.fail(f"started: {line}"))


def test_ctrl_c_ends_up_while_it_waits_for_the_controller(own_spec, monkeypatch):
    """The controller's actor may wait for a node for as long as it likes."""
    from crossdock.deploy.ray import control_plane, session

    class Never:
        killed = False

        def started(self, timeout_s: float) -> str:
            asked.set()
            time.sleep(min(timeout_s, 20))
            raise TimeoutError("no answer")

        def down(self, *_: object) -> None:
            raise TimeoutError("no answer")

        def kill(self, restart: bool) -> None:
            Never.killed = not restart

    asked = threading.Event()
    monkeypatch.setattr(session, "start_ray", lambda *_: None)
    monkeypatch.setattr(session, "stop_ray", lambda: None)
    monkeypatch.setattr(control_plane, "start_controller", lambda *_, **__: Never())
    presser = threading.Thread(
        target=lambda: asked.wait(20) and os.kill(os.getpid(), signal.SIGINT)
    )
    presser.start()
    began = time.monotonic()
    assert up(own_spec, "joined", start_timeout_s=60, echo=lambda line: None) == 130
    presser.join()
    assert time.monotonic() - began < 10 and Never.killed
