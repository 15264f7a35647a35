"""What a local cluster leaves open on its host: ports to other hosts, files to other users."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ports import tried, unexpected
from ray_kit import ask, serving, temp_folders, write_spec

from crossdock import cli
from crossdock.deploy import credentials, processes
from crossdock.deploy.authority import Authority
from crossdock.deploy.listening import listening
from crossdock.deploy.store import ClusterStore
from crossdock.deploy.up import Cluster
from crossdock.proto.channels import open_blocking_channel
from crossdock.proto.v1 import admin_pb2, admin_pb2_grpc, worker_pb2, worker_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_model) -> Iterator[Cluster]:
    """Over NIXL, as is usual, and after a request, so that workers know each other."""
    folder = tmp_path_factory.mktemp("exposure")
    (folder / "ucx.conf").write_text("UCX_TLS=no_such_transport\n")
    (folder / "attrs.py").write_text("raise SystemExit('foreign code was run')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # one that somebody else has put something into
        with serving(write_spec(folder / "c.yaml", tiny_model), timeout_s=120) as cluster:
            ask(cluster)
            yield cluster


def ours() -> list[int]:
    return [os.getpid(), *(process.pid for process in processes.descendants(os.getpid()))]


def test_every_port_is_on_the_loopback(cluster):
    ports = listening(ours())
    names = {port.process for port in ports}
    members = {pid for port in ports if port.process == "ray::MemberActor" for pid in [port.pid]}
    assert {"gcs_server", "raylet", "ray::ControllerActor"} <= names and len(members) == 3
    assert not [port for port in ports if port.host not in ("127.0.0.1", "::1")]


def test_workers_take_nothing_from_the_folder_that_up_was_started_in(cluster):
    """They serve (see the fixture) although it has a ucx.conf that names no transport."""
    status = cluster.status()
    folders = {os.readlink(f"/proc/{w.pid}/cwd") for w in (*status.workers, *status.gateways)}
    assert folders == {"/"}
    assert "attrs" not in os.listdir("/")


def private(path: Path) -> bool:
    """Whether nobody else gets to it: it, or a folder above it, is closed to them."""
    return any(not each.stat().st_mode & 0o077 for each in (path, *path.parents))


def test_every_file_is_the_users_alone(cluster):
    status = cluster.status()
    [folder] = {path for pid in ours() for path in temp_folders(pid)}
    made = [path for path in Path(folder).rglob("*") if not path.is_symlink()]
    assert any(stat.S_ISSOCK(path.stat().st_mode) for path in made), "Ray's sockets are below it"
    assert any("logs" in path.parts for path in made) and any(p.name == "token" for p in made)
    kept = list(ClusterStore(cluster.spec.metadata.name).folder.rglob("*"))
    assert kept
    assert not [path for path in (*made, *kept) if not private(path)]
    pids = {str(member.pid) for member in (*status.workers, *status.gateways)}
    shared = [path for path in Path("/dev/shm").iterdir() if pids & set(path.name.split("-"))]
    assert not [path for path in shared if path.stat().st_mode & 0o077]
    opened = {file for pid in ours() for file in open_files(pid) if file.startswith("/dev/shm/")}
    assert any("plasma" in file for file in opened), "Ray's object store is among them"


def test_open_files_in_shared_memory_have_no_mode_for_others(cluster):
    for pid in ours():
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("/dev/shm/"):
                assert not os.stat(entry.path).st_mode & 0o077, target


def open_files(pid: int) -> set[str]:
    try:
        return {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    except OSError:
        return set()


def examined(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code of crossdock doctor and what it found."""
    capsys.readouterr()
    code = cli.main(["doctor", "--address", cluster.admin, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_lists_every_port_and_finds_none_that_is_wide(cluster, capsys):
    code, found = examined(cluster, capsys)
    assert code == 0 and found["ok"], found["problems"]
    listed = {(port["pid"], port["host"], port["port"]) for port in found["ports"]}
    assert listed == {(port.pid, port.host, port.port) for port in listening(ours())}
    what = {port["what"] for port in found["ports"]}
    assert {"Ray's GCS", "Ray's raylet", "controller.grpc", "gateway.grpc", "gateway.http"} < what
    assert {"a worker's gRPC", "a worker's metrics", "Ray's core worker, or KV transfer"} < what


def test_doctor_names_a_wide_port_and_exits_1(cluster, capsys):
    with socket.create_server(("", 0)) as wide:
        address = f"0.0.0.0:{wide.getsockname()[1]}"
        code, found = examined(cluster, capsys)
    [problem] = found["problems"]
    assert code == 1 and f"{address} " in problem["what"]
    assert f"pid {os.getpid()}" in problem["what"] and problem["do"]


def test_a_stranger_gets_health_and_refusals_alone(cluster):
    """At every port, by tools/ports.py; and nothing ends of being asked. The gateway's own doors
    are open here: there is no `auth`."""
    before = members(cluster)
    with ThreadPoolExecutor(8) as pool:
        answers = [answer for found in pool.map(tried, listening(ours())) for answer in found]
    asked = {(answer.port.process, answer.asked) for answer in answers if answer.given}
    assert ("gcs_server", "grpc.health.v1.Health/Check") in asked, "Ray was not understood"
    assert ("ray::MemberActor", "crossdock.v1.Inference/ListModels") in asked, "nor the gateway"
    refused = [answer.said for answer in answers if answer.asked.startswith("ray.rpc.")]
    assert sum("InvalidAuthToken" in said for said in refused) > 10
    assert unexpected(answers, doors=(cluster.grpc, cluster.http)) == []
    inside = {cluster.admin, *(worker.address for worker in cluster.status().workers)}
    assert inside <= {answer.port.address for answer in answers}
    given = [answer for answer in answers if answer.given and answer.port.address in inside]
    assert given == [], "not even health"
    assert members(cluster) == before
    assert len(ask(cluster, salt=2).token_ids) == 8


JOIN = """
import sys
import crossdock.deploy.ray
import ray
from ray._raylet import GcsClient
try:
    print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", timeout=10)), "keys")
except ray.exceptions.AuthenticationError as error:
    sys.exit(f"refused: {error}")
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(len(ray.nodes()), "nodes")
"""


def join(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As another process of this host, with what it has of Ray's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # to believe that it is on the loopback
    return subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env={**clean, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nobody_joins_without_the_token(cluster, tmp_path):
    import ray

    address, home = ray.get_runtime_context().gcs_address, {"HOME": str(tmp_path)}
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    owner = join(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token, **home)
    assert "1 nodes" in owner.stdout, owner.stderr
    nobody = join(address, RAY_AUTH_MODE="disabled", **home)
    guess = join(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64, **home)
    for refused in (nobody, guess):
        assert "refused: " in refused.stderr and "keys" not in refused.stdout, refused.stderr


def test_another_clusters_certificates_open_nothing(cluster):
    """Of one by the same name, for the very process that is dialed, in each role."""
    name = cluster.spec.metadata.name
    theirs = Authority(b"the key of another life of it.....", name)
    status = cluster.status()
    dialed = {w.address: w.worker.description.incarnation.hex() for w in status.workers}
    for role in ("controller", "gateway", "decode", "operator"):
        proof = theirs.credentials(role, role)
        for address, incarnation in dialed.items():
            with open_blocking_channel(address, proof, incarnation) as channel:
                worker = worker_pb2_grpc.WorkerStub(channel)
                assert refused(worker.Describe, worker_pb2.DescribeRequest())
                assert refused(worker.GetStatus, worker_pb2.GetStatusRequest())
        with open_blocking_channel(cluster.admin, proof, "controller") as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            assert refused(admin.GetClusterStatus, admin_pb2.GetClusterStatusRequest())
            assert refused(admin.Down, admin_pb2.DownRequest())
    operator = credentials.find(cluster.admin)
    for address, incarnation in dialed.items():
        with open_blocking_channel(address, operator, incarnation) as channel:
            worker = worker_pb2_grpc.WorkerStub(channel)
            assert refused(worker.Describe, worker_pb2.DescribeRequest(), "PERMISSION_DENIED")
            assert worker.GetStatus(worker_pb2.GetStatusRequest(), timeout=20).uptime_s > 0


def refused(call, request, status: str = "UNAVAILABLE") -> bool:
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=20)
    return error.value.code().name == status


def members(cluster: Cluster) -> set[tuple[str, int, int]]:
    status = cluster.status()
    return {(m.name, m.pid, m.restarts) for m in (*status.workers, *status.gateways)}
