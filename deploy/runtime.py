"""What the controller needs of whatever runs its processes: Ray in life, a fake in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from crossdock.deploy.listening import Listening
from crossdock.deploy.reconcile import GATEWAY_ROLE, Target
from crossdock.deploy.spec import GATEWAY_POOL, ClusterSpec, plain
from crossdock.proto.hashing import hash_key
from crossdock.proto.settings import given, overlap
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.router.config import GatewayConfig, probe_key
from crossdock.router.dispatch.traffic import Traffic
from crossdock.router.frontdoor.audit_chain import signing_key
from crossdock.router.serving import Serving
from crossdock.worker.config import WorkerConfig

TRIAL = f"{GATEWAY_POOL}-trial"  # the name of a gateway that is only tried


@dataclass(frozen=True)
class Placement:
    """What one process reserves and where it may run."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory_mb: int = 0
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    on_head: bool = False


@dataclass(frozen=True)
class Launch:
    """One process to start: a worker (`worker` is set) or a gateway (`gateway` is)."""

    name: str
    pool: str
    role: str
    revision: str
    placement: Placement
    telemetry: Mapping[str, str]
    worker: WorkerConfig | None = None
    gateway: GatewayConfig | None = None
    host: str = ""  # that a worker listens on; its node's address where empty
    model: str = ""  # of a worker, where the cluster has several

    @property
    def holds(self) -> frozenset[str]:
        """The addresses that this process takes for itself alone."""
        return frozenset({self.gateway.grpc, self.gateway.http} if self.gateway else ())


@dataclass(frozen=True)
class Started:
    """Where a started process is found. `endpoint` is a worker's; `grpc` and `http` a gateway's.
    `leaving`: it was told to drain or stop before, and takes no work again."""

    pid: int
    node_id: str
    endpoint: WorkerEndpoint | None = None
    grpc: str = ""
    http: str = ""
    leaving: bool = False

    @property
    def address(self) -> str:
        """Where it serves: a worker's, or a gateway's gRPC, as host:port."""
        return self.endpoint.address if self.endpoint else self.grpc


@dataclass(frozen=True)
class Membership:
    """What a process is told of the cluster. `serving`, a gateway's alone: what clients may ask
    for."""

    endpoints: Sequence[WorkerEndpoint]
    serving: Serving | None = None


class Process(Protocol):
    """One worker or gateway process. Every method may raise ProcessGone."""

    async def request_certificate(self) -> bytes:
        """Asks (PEM) for a certificate of a key that it has made and keeps to itself."""

    async def certify(self, certificate: bytes, authority: bytes) -> None:
        """The answer to its last request (PEM), before `start` and whenever it is to be renewed."""

    async def start(self) -> Started:
        """Starts serving; returns at once when it serves already. Raises StartFailed."""

    async def gone(self) -> str:
        """Returns when the process is no more, and says why."""

    async def update(self, members: Membership) -> None:
        """What the cluster is now: a gateway's workers to send to, a worker's to pull from."""

    async def drain(self, timeout_s: float, stays: bool = False) -> bool:
        """Takes no new work, finishes what it has. True when nothing is left. `stays`: it is to
        go on, in another role."""

    async def become(self, launch: Launch) -> Started:
        """Goes on as that worker, whose certificate it has, once it is drained. Raises
        StartFailed where it cannot."""

    async def active_requests(self) -> int:
        """Requests that a gateway holds now."""

    async def traffic(self) -> Mapping[str, Traffic]:
        """What a gateway has counted since it started, by model."""

    async def explain(self, request_id: str) -> bytes:
        """What a gateway knows of a request, a serialized ExplainedRequest; empty: nothing."""

    async def listening(self) -> Sequence[Listening]:
        """The ports of all the cluster's processes on its node."""

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stops serving and ends the process, by force after `grace_s`, also one that hangs; then
        it is gone, unless its node cannot be reached. Never raises."""


class Runtime(Protocol):
    """Where processes come from: Ray, or a fake. `local`: all are on one host."""

    local: bool

    def listening(self) -> tuple[str, Sequence[Listening]]:
        """This process's node, and the ports of all the cluster's processes there."""

    async def launch(self, launch: Launch) -> Process:
        """Asks for a process; `start` of it waits until it is there."""

    async def adopt(self) -> Sequence[tuple[Launch, Process]]:
        """The processes of this cluster that run already."""

    def why_waiting(self, launch: Launch) -> str:
        """What keeps a launch from being placed, empty when nothing known does."""


def trial_launch(spec: ClusterSpec, taken: Set[str], cluster_key: bytes, own_key: bytes) -> Launch:
    """The first gateway of `spec`, on free ports in place of the addresses in `taken`."""
    launch = gateway_launch(spec, TRIAL, 0, cluster_key, own_key)
    assert launch.gateway is not None
    free: dict[str, Any] = {
        door: address.rpartition(":")[0] + ":0"
        for door, address in zip(("grpc", "http"), spec.gateway_addresses(0), strict=True)
        if any(overlap(address, other) for other in taken)
    }
    return replace(launch, gateway=replace(launch.gateway, **free))


def targets(spec: ClusterSpec) -> list[Target]:
    """The pools of `spec` as reconcile() wants them; gateways are one more pool."""
    pools = [
        Target(
            name,
            pool.role,
            pool.replicas,
            spec.pool_revision(name),
            model=pool.model,
            kind=spec.worker_kind(name) if pool.hands_over else "",
        )
        for name, pool in spec.pools.items()
    ]
    replicas = spec.gateway.replicas
    slots = tuple(frozenset(spec.gateway_addresses(index)) for index in range(replicas))
    gateway = Target(GATEWAY_POOL, GATEWAY_ROLE, replicas, spec.gateway_revision(), slots)
    return [gateway, *pools]


class ProcessGone(Exception):
    """The process ended; the text says how."""


class StartFailed(Exception):
    """The process came up but could not serve; the text says why."""


class CannotStart(StartFailed):
    """A setting, the model or Ray's refusal is why: trying again does not help."""


def worker_launch(spec: ClusterSpec, pool_name: str, name: str, cluster_key: bytes) -> Launch:
    """How one worker of a pool is started."""
    pool = spec.pools[pool_name]
    revision, model = spec.pool_revision(pool_name), spec.model_of(pool_name)
    threads = str(pool.engine_threads)
    config = WorkerConfig(
        name=name,
        pool=pool_name,
        role=Role(pool.role),
        cluster_key=cluster_key,
        gpus=pool.resources.gpus,
        threads=pool.engine_threads,
        revision=revision,
        model=model.id,
        dtype=model.dtype,
        **given(spec.kv),
        **given(pool),
    )
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    env |= {f"UCX_{name}": value for name, value in spec.kv.ucx.items()}
    placement = Placement(**plain(pool.resources), labels=dict(pool.nodes.labels), env=env)
    traces = plain(spec.telemetry)
    about = (name, pool_name, pool.role, revision, placement, traces)
    return Launch(*about, worker=config, model=pool.model)


def gateway_launch(
    spec: ClusterSpec, name: str, index: int, cluster_key: bytes, own_key: bytes
) -> Launch:
    """How gateway `index` is started. It gets no more of the workers' `cluster_key` than block
    hashes need, and of `own_key`, which they have no part in, what audit log and trial need."""
    grpc, http = spec.gateway_addresses(index)
    config = GatewayConfig(
        name=name,
        model=spec.model.id,
        serving=spec.serving,
        hash_key=hash_key(cluster_key),
        block_size=spec.kv.block_size,
        slo=spec.slo,
        auth=spec.auth,
        audit=replace(spec.audit, file="") if name == TRIAL else spec.audit,
        audit_seed=signing_key(own_key),
        prices=dict(spec.prices),
        cluster="" if name == TRIAL else spec.metadata.name,
        gateways=spec.gateway.replicas,
        probe_key=probe_key(own_key),
        **given(spec.gateway.limits),
        policies=spec.gateway.policies,
        http_options=spec.gateway.http_options,
        responses=spec.gateway.responses,
        tls=spec.gateway.tls,
        **given(spec.gateway) | {"grpc": grpc, "http": http},
    )
    labels = dict(spec.gateway.nodes.labels)
    placement = Placement(labels=labels, on_head=not labels, env={"OMP_NUM_THREADS": "1"})
    revision, traces = spec.gateway_revision(), plain(spec.telemetry)
    return Launch(name, GATEWAY_POOL, GATEWAY_ROLE, revision, placement, traces, gateway=config)
