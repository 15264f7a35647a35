"""Which ports are wider than they must be: by hand-made findings and by /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from crossdock import doctor
from crossdock.deploy.listening import Listening, listening
from crossdock.doctor import Report
from crossdock.exposure import PortFacts, ports_of, wide
from crossdock.proto.v1 import admin_pb2

RAYLET = PortFacts("0123456789", "raylet", 7, "127.0.0.1", 1000, "Ray's raylet")
WORKER = PortFacts(
    "0123456789", "ray::MemberActor", 8, "10.0.0.1", 1001, "Ray's core worker, or KV transfer"
)
GATEWAY = PortFacts("0123456789", "ray::MemberActor", 9, "10.0.0.1", 50051, "gateway.grpc")


def at(host: str, port: PortFacts) -> PortFacts:
    return PortFacts(port.node, port.process, port.pid, host, port.port, port.what)


def test_the_loopback_is_as_narrow_as_can_be() -> None:
    hosts = ("127.0.0.1", "::1", "127.0.0.9")
    ports = [at(host, each) for host in hosts for each in (RAYLET, WORKER, GATEWAY)]
    assert not list(wide(ports, local=True)) and not list(wide(ports, local=False))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fe80::1"])
def test_what_a_local_cluster_has_beyond_the_loopback_is_a_problem(host: str) -> None:
    [found] = wide([at(host, RAYLET), at("127.0.0.1", WORKER)], local=True)
    assert found.problem and found.subject == "node 01234567"
    address = at(host, RAYLET).address
    assert found.what == f"Ray's raylet listens on {address} (raylet, pid 7)"


def test_what_the_yaml_says_is_at_most_a_warning() -> None:
    assert not list(wide([GATEWAY], local=True))
    [found] = wide([at("0.0.0.0", GATEWAY)], local=True)
    assert not found.problem and "gateway.grpc" in found.do


def test_on_many_hosts_a_nodes_address_is_narrow_and_every_address_a_warning() -> None:
    assert not list(wide([WORKER, at("10.0.0.1", RAYLET)], local=False))
    [found] = wide([at("::", WORKER), at("0.0.0.0", WORKER)], local=False)
    assert not found.problem and "network policy" in found.do
    assert "[::]:1001" in found.what and "0.0.0.0:1001" in found.what, "one line for both"


def test_a_wide_port_fails_the_report_of_a_local_cluster_alone() -> None:
    local = Report("c", (), (), [at("::", RAYLET)], local=True)
    assert any("raylet" in str(each) for each in local.findings if each.problem)
    assert not doctor.as_json(local)["ok"]
    assert doctor.as_json(local)["ports"][0]["host"] == "::"
    spread = Report("c", (), (), [at("::", RAYLET)], local=False)
    assert any("raylet" in str(each) for each in spread.findings if not each.problem)


def test_ports_are_named_by_what_is_known_of_their_owners() -> None:
    def port(process: str, pid: int, number: int, host: str = "127.0.0.1") -> Any:
        return admin_pb2.ListeningPort(process=process, pid=pid, host=host, port=number)

    worker = admin_pb2.MemberStatus(name="prefill-0", address="127.0.0.1:11", pid=1)
    worker.worker.description.metrics_address = "127.0.0.1:12"
    cluster = admin_pb2.ClusterStatus(
        workers=[worker],
        gateways=[admin_pb2.GatewayStatus(pid=2, grpc="127.0.0.1:21", http="[::1]:22")],
        nodes=[
            admin_pb2.NodePorts(
                node_id="n",
                ports=[
                    *(port("ray::MemberActor", 1, number) for number in (11, 12, 13)),
                    *(port("ray::MemberActor", 2, number) for number in (21, 22, 11)),
                    *(port("ray::ControllerActor", 3, number) for number in (31, 32)),
                    *(port(name, 4, 41) for name in ("gcs_server", "crossdock")),
                ],
            )
        ],
    )
    assert [each.what for each in ports_of(cluster, "127.0.0.1:31")] == [
        *("a worker's gRPC", "a worker's metrics", "Ray's core worker, or KV transfer"),
        *("gateway.grpc", "gateway.http", "Ray's core worker, or KV transfer"),
        *("controller.grpc", "Ray's core worker", "Ray's GCS", "Ray's core worker"),
    ]


@pytest.mark.parametrize(
    ("family", "bound", "shown"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "0.0.0.0"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_ports_are_found_with_the_address_that_they_are_bound_to(
    family: socket.AddressFamily, bound: str, shown: str
) -> None:
    with socket.socket(family) as server, socket.socket(family) as idle:
        server.bind((bound, 0))
        server.listen()
        idle.bind((bound, 0))
        found = {(each.host, each.port) for each in listening([os.getpid()])}
        assert (shown, server.getsockname()[1]) in found
        assert (shown, idle.getsockname()[1]) not in found, "it does not listen"
    assert not listening([2**22 + 1]), "nobody"


def test_ports_are_those_of_the_processes_asked_for() -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1])"
    command = [sys.executable, "-uc", f"{code}; input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        [found] = listening([other.pid])
        assert found == Listening(os.path.basename(sys.executable), other.pid, "127.0.0.1", port)
        assert port not in {each.port for each in listening([os.getpid()])}
        other.communicate("\n")
