"""Which ports a cluster's processes listen on, what each is, and which are wider than they must."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from crossdock.proto.settings import EVERY_HOST, loopback_host, split_address
from crossdock.proto.v1 import admin_pb2

RAY = {
    "gcs_server": "Ray's GCS",
    "raylet": "Ray's raylet",
    "monitor.py": "Ray's autoscaler",
    "dashboard.py": "Ray's dashboard",
    "ray::DashboardAgent": "Ray's dashboard agent",
    "ray::RuntimeEnvAgent": "Ray's runtime environment agent",
}
IN_A_MEMBER = "Ray's core worker, or KV transfer"
OTHER = "Ray's core worker"  # of the process that started the cluster
CONTROLLER_PID = 0  # a status does not say it
DOORS = ("gateway.grpc", "gateway.http", "controller.grpc")  # whose addresses the YAML says


@dataclass(frozen=True)
class PortFacts:
    """A port as it was found. `what` is a field of the YAML, or says what listens."""

    node: str
    process: str
    pid: int
    host: str
    port: int
    what: str

    @property
    def address(self) -> str:
        """host:port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Wide(NamedTuple):
    """Ports of one kind on one node that others reach than need to. A problem where Crossdock
    could have bound them narrower."""

    subject: str
    what: str
    do: str
    problem: bool


def ports_of(cluster: admin_pb2.ClusterStatus, controller: str) -> list[PortFacts]:
    """Those of a status that was asked for them; `controller` is where it was asked."""
    known = dict(_known(cluster))
    admin_port = split_address(controller)[1]

    def facts(node: str, port: admin_pb2.ListeningPort) -> PortFacts:
        what = _what(port, known, admin_port)
        return PortFacts(node, port.process, port.pid, port.host, port.port, what)

    return [facts(node.node_id, port) for node in cluster.nodes for port in node.ports]


def wide(ports: Sequence[PortFacts], local: bool) -> Iterator[Wide]:
    """Of a cluster on one host, whatever is not on its loopback, unless the YAML says so; of
    others, what listens on every address of its node. Pure."""
    groups: defaultdict[tuple[str, str], list[PortFacts]] = defaultdict(list)
    for each in ports:
        everywhere, ours = each.host in EVERY_HOST, each.what in DOORS
        if everywhere or (local and not ours and not loopback_host(each.host)):
            groups[each.node, each.what].append(each)
    for (node, what), group in groups.items():
        where = ", ".join(f"{each.address} ({each.process}, pid {each.pid})" for each in group)
        problem = local and what not in DOORS
        yield Wide(f"node {node[:8]}", f"{what} listens on {where}", _advice(what, local), problem)


def _known(cluster: admin_pb2.ClusterStatus) -> Iterator[tuple[tuple[int, int], str]]:
    """What listens, by process and port, as far as its owner says."""
    if cluster.metrics_address:
        yield (CONTROLLER_PID, split_address(cluster.metrics_address)[1]), "controller's metrics"
    for gateway in cluster.gateways:
        for door, address in (("gateway.grpc", gateway.grpc), ("gateway.http", gateway.http)):
            if address:
                yield (gateway.pid, split_address(address)[1]), door
    for worker in cluster.workers:
        if worker.address:
            yield (worker.pid, split_address(worker.address)[1]), "a worker's gRPC"
        if metrics := worker.worker.description.metrics_address:
            yield (worker.pid, split_address(metrics)[1]), "a worker's metrics"


def _what(
    port: admin_pb2.ListeningPort, known: Mapping[tuple[int, int], str], admin_port: int
) -> str:
    if port.process == "ray::ControllerActor":
        if port.port == admin_port:
            return "controller.grpc"
        return known.get((CONTROLLER_PID, port.port), OTHER)
    if port.process == "ray::MemberActor":
        return known.get((port.pid, port.port), IN_A_MEMBER)
    return RAY.get(port.process, OTHER)


def _advice(what: str, local: bool) -> str:
    if what in DOORS:
        return f"name the one address in {what} that is dialed, with TLS and `auth` before tenants"
    if what == IN_A_MEMBER and local:
        return (
            "leave NET_DEVICES out of kv.ucx, and UCX_NET_DEVICES and RAY_* out of the environment"
        )
    if local:
        return (
            "a Ray that `crossdock up` starts is on the loopback: leave RAY_* unset, start it again"
        )
    return "Ray binds so: a network policy must keep others out (docs/security.md)"
