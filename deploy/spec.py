"""What a cluster should be: the YAML file as frozen dataclasses.

Each field carries its own documentation, range and choices; the parser, the checks and the
reference in docs/operations.md are all made from them.
"""

# ruff: noqa: RUF009  (setting() is dataclasses.field with documentation)
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from crossdock.deploy.address_rules import GATEWAY_POOL as GATEWAY_POOL
from crossdock.deploy.address_rules import check_pool_names, check_ports, check_tls, check_url
from crossdock.deploy.autoscaling.rules import check_autoscale
from crossdock.deploy.autoscaling.settings import AutoscaleSettings, PoolAutoscale
from crossdock.deploy.model_rules import (
    check_engines,
    check_gpus,
    check_models,
    check_pools,
    check_ranks,
)
from crossdock.deploy.ray_rules import (
    check_amount,
    check_labels,
    check_ray_address,
    check_resources,
)
from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import (
    CONTROLLER_ADDRESS,
    check_settings,
    no_entries,
    of,
    setting,
    split_address,
)
from crossdock.proto.types import Role
from crossdock.router.config import (
    AuditSettings,
    AuthSettings,
    GatewayConfig,
    HttpSettings,
    Price,
    ResponsesSettings,
    Slo,
    TlsFiles,
)
from crossdock.router.placement.policy import Policies
from crossdock.router.serving import TOOL_PARSERS, Rule, ServedModel, Serving
from crossdock.worker.config import EngineSettings, WorkerConfig

API_VERSION = "crossdock/v1"
KIND = "Cluster"


@dataclass(frozen=True)
class MetadataSpec:
    """The YAML's `metadata`."""

    name: str = setting(doc="Name of the cluster: one controller by this name runs.", kind="name")


@dataclass(frozen=True)
class ModelSpec:
    """The YAML's `model`: the one that a cluster serves. Clients call it as its files are."""

    id: str = setting("", of(WorkerConfig, "model").metadata["doc"])
    dtype: str = of(WorkerConfig, "dtype")


@dataclass(frozen=True)
class NamedModelSpec:
    """One entry of the YAML's `models`. Clients call it by the entry's name, or an alias."""

    id: str = of(WorkerConfig, "model")
    dtype: str = of(WorkerConfig, "dtype")
    aliases: tuple[str, ...] = setting((), "Other names that requests may have for it.")
    tool_parser: str = setting(
        "", "How it writes calls of tools; where not set as gateway.tool_parser.",
        choices=("", *TOOL_PARSERS),
    )  # fmt: skip


@dataclass(frozen=True)
class NodesSpec:
    """The YAML's `nodes` of a pool: where its workers may run."""

    labels: Mapping[str, str] = setting(
        factory=no_entries,
        doc="Ray node labels that a node must have to be used.",
        check=check_labels,
    )


@dataclass(frozen=True)
class LimitsSpec:
    """The YAML's `limits` of a gateway."""

    max_body_mb: float = of(GatewayConfig, "max_body_mb")
    max_active: int = of(GatewayConfig, "max_active")
    max_active_per_tenant: int = of(GatewayConfig, "max_active_per_tenant")
    max_request_share: float = of(GatewayConfig, "max_request_share")
    request_timeout_s: float = of(GatewayConfig, "request_timeout_s")
    max_connection_age_s: float = of(GatewayConfig, "max_connection_age_s")
    worker_wait_s: float = of(GatewayConfig, "worker_wait_s")


@dataclass(frozen=True)
class GatewaySpec:
    """The YAML's `gateway`."""

    replicas: int = setting(
        1, "Number of gateways. Gateway i listens on both ports + i.", low=1, high=64
    )
    grpc: str = of(GatewayConfig, "grpc")
    http: str = of(GatewayConfig, "http")
    policy: str = of(GatewayConfig, "policy")
    policies: Policies = setting(
        factory=Policies,
        doc="Numbers of the policies that have some, for the one that is chosen.",
    )
    local_prompt_tokens: int = of(GatewayConfig, "local_prompt_tokens")
    tool_parser: str = of(GatewayConfig, "tool_parser")
    http_options: HttpSettings = setting(factory=HttpSettings, doc="How OpenAI HTTP is served.")
    responses: ResponsesSettings = setting(
        factory=ResponsesSettings, doc="What is kept of /v1/responses."
    )
    tls: TlsFiles = setting(factory=TlsFiles, doc="TLS at both front doors.")
    limits: LimitsSpec = setting(factory=LimitsSpec, doc="What one gateway takes on.")
    drain_s: float = setting(
        10.0, "How long a stopping gateway may finish its requests.", low=0, high=3600
    )
    nodes: NodesSpec = setting(
        factory=NodesSpec, doc="Which nodes gateways run on; the head node where not set."
    )


@dataclass(frozen=True)
class ControllerSpec:
    """The YAML's `controller`."""

    grpc: str = setting(
        CONTROLLER_ADDRESS,
        "Where the controller answers crossdock status, explain, apply, scale and down.",
        kind="address",
    )
    nodes: NodesSpec = setting(
        factory=NodesSpec,
        doc="Which nodes it may run on; the head node where not set. It goes on with key, spec and "
        "workers on whichever of them Ray starts it again.",
    )


@dataclass(frozen=True)
class ResourcesSpec:
    """The YAML's `resources` of one worker."""

    cpus: float = setting(
        1.0, "Ray CPUs each worker reserves.", low=0, high=4096, check=check_amount
    )
    gpus: float = setting(
        0.0,
        "Ray GPUs of each worker, whole above 1; with 0 it runs on the CPU.",
        low=0,
        high=64,
        check=check_amount,
    )
    memory_mb: int = setting(
        0, "Memory each worker reserves with Ray, MB; 0 reserves none.", low=0, high=64_000_000
    )
    custom: Mapping[str, float] = setting(
        factory=no_entries,
        doc="Custom Ray resources: pins a pool to nodes that offer them.",
        check=check_resources,
    )


@dataclass(frozen=True)
class PoolSpec:
    """One entry of the YAML's `pools`: workers that are alike."""

    role: str = setting(
        doc="What its workers do: one phase, or (colocated) both.",
        choices=tuple(role.value for role in Role),
    )
    model: str = setting("", "Which of models it serves; needed where there are models.")
    replicas: int = setting(
        1, "Number of workers; of an autoscaled pool, with how many it starts.", low=0, high=1024
    )
    autoscale: PoolAutoscale = setting(
        factory=PoolAutoscale, doc="Its size follows the load, within these bounds."
    )
    resources: ResourcesSpec = setting(factory=ResourcesSpec, doc="What each worker reserves.")
    nodes: NodesSpec = setting(factory=NodesSpec, doc="Which nodes its workers run on.")
    threads: int = setting(
        0, "CPU threads of one worker's engine; 0: as many as cpus, at least 1.", low=0, high=1024
    )
    engine: EngineSettings = of(WorkerConfig, "engine")
    kv_memory_mb: int = of(WorkerConfig, "kv_memory_mb")
    max_batch: int = of(WorkerConfig, "max_batch")
    chunk_tokens: int = of(WorkerConfig, "chunk_tokens")
    drain_s: float = setting(
        60.0, "How long a worker that is taken away may finish its work.", low=0, high=86_400
    )

    @property
    def engine_threads(self) -> int:
        """CPU threads of each worker's engine: as many as it reserves, at least 1."""
        return self.threads or max(1, int(self.resources.cpus))

    @property
    def hands_over(self) -> bool:
        """Whether its workers hand KV over to those of another pool, or take it from them."""
        return self.role != Role.COLOCATED


@dataclass(frozen=True)
class KVSpec:
    """The YAML's `kv`."""

    transport: str = of(WorkerConfig, "transport")
    dtype: str = of(WorkerConfig, "kv_dtype")
    block_size: int = of(WorkerConfig, "block_size")
    lease_s: float = of(WorkerConfig, "lease_s")
    pull_timeout_s: float = of(WorkerConfig, "pull_timeout_s")
    reserve: str = of(WorkerConfig, "reserve")
    verify: str = of(WorkerConfig, "verify")
    ucx: Mapping[str, str] = of(WorkerConfig, "transport_options")


@dataclass(frozen=True)
class TelemetrySpec:
    """The YAML's `telemetry`."""

    exporter: str = setting("none", "Where traces go.", choices=("none", "otlp", "console"))
    endpoint: str = setting(
        "http://127.0.0.1:4317",
        "OTLP collector (gRPC), http:// or https://, where exporter is otlp.",
        check=check_url,
    )


@dataclass(frozen=True)
class RaySpec:
    """The YAML's `ray`."""

    address: str = setting(
        "",
        "Ray cluster to join: auto, or HOST:PORT of its head. Empty: a local one is started.",
        check=check_ray_address,
    )
    object_store_mb: int = setting(
        80,
        "Object store of a local Ray, MB. No token or KV byte goes through it.",
        low=75,
        high=1_000_000,
    )


@dataclass(frozen=True)
class ClusterSpec:
    """One cluster. Build it with `load` or `parse`; `validate` checks one built by hand."""

    metadata: MetadataSpec = setting(doc="Identity.")
    pools: Mapping[str, PoolSpec] = setting(
        doc="Groups of like workers, by name. At least one worker of each phase, of each model."
    )
    model: ModelSpec = setting(factory=ModelSpec, doc="The model that is served; or models.")
    models: Mapping[str, NamedModelSpec] = setting(
        factory=no_entries,
        doc="Several models, by the names that clients use; the first is for requests without.",
    )
    routes: Mapping[str, tuple[Rule, ...]] = setting(
        factory=no_entries,
        doc="Names for which rules choose the model: the first rule that holds.",
    )
    apiVersion: str = setting(API_VERSION, "Version of this format.", choices=(API_VERSION,))
    kind: str = setting(KIND, "Always Cluster.", choices=(KIND,))
    gateway: GatewaySpec = setting(factory=GatewaySpec, doc="The front door.")
    controller: ControllerSpec = setting(factory=ControllerSpec, doc="The control plane.")
    kv: KVSpec = setting(factory=KVSpec, doc="The KV pools and the hand-off.")
    slo: Slo = setting(factory=Slo, doc="What the router, the autoscaler and the reports aim at.")
    autoscale: AutoscaleSettings = setting(
        factory=AutoscaleSettings, doc="How autoscaled pools follow the load."
    )
    auth: AuthSettings = setting(factory=AuthSettings, doc="Who may use the front door.")
    audit: AuditSettings = setting(factory=AuditSettings, doc="What is written down of requests.")
    prices: Mapping[str, Price] = setting(
        factory=no_entries, doc="What tokens cost, by model; in one currency."
    )
    telemetry: TelemetrySpec = setting(factory=TelemetrySpec, doc="Traces.")
    ray: RaySpec = setting(factory=RaySpec, doc="The Ray cluster underneath.")

    @classmethod
    def load(cls, path: str | Path) -> ClusterSpec:
        """Reads and checks a file. Raises ConfigError naming file, line and field."""
        file = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError("file", f"cannot be read: {error.strerror}", file) from None
        except UnicodeDecodeError as error:
            raise ConfigError("file", f"is not UTF-8: {error}", file) from None
        return cls.parse(text, file)

    @classmethod
    def parse(cls, text: str, file: str = "<text>") -> ClusterSpec:
        """Reads and checks a text. Raises ConfigError naming file, line and field."""
        from crossdock.deploy.spec_yaml import parse

        return parse(text, file)

    def to_yaml(self) -> str:
        """Every field written out; `parse` of it gives an equal spec."""
        return yaml.safe_dump(plain(self), sort_keys=False, allow_unicode=True)

    def validate(self) -> ClusterSpec:
        """Raises ConfigError (without a line) at the first field that is out of its range."""
        check_settings(self)
        self.auth.check()
        check_models(self)
        check_pool_names(self.pools)
        check_pools(self)
        check_engines(self)
        check_gpus(self)
        check_ranks(self)
        check_autoscale(self)
        check_ports(self)
        check_tls(self.gateway.tls)
        return self

    def with_replicas(self, pool: str, replicas: int) -> ClusterSpec:
        """The same with `replicas` workers in `pool`. Raises ConfigError."""
        if pool not in self.pools:
            known = ", ".join(sorted(self.pools))
            raise ConfigError("pool", f"{pool!r} is unknown; the pools are {known}")
        if bounds := self.pools[pool].autoscale:
            within = f"it is autoscaled from {bounds.min} to {bounds.max} workers"
            raise ConfigError(
                "pool", f"{pool!r} has no fixed size: {within}; change pools.{pool}.autoscale"
            )
        changed = replace(self.pools[pool], replicas=replicas)
        pools = {**self.pools, pool: changed}
        return replace(self, pools=MappingProxyType(pools)).validate()

    def pool_revision(self, pool: str) -> str:
        """Digest of all that a running worker of `pool` was started with, but not their number:
        where it changes, workers are replaced."""
        model = self.model_of(pool)
        return _revision(self.pools[pool], [model.id, model.dtype], self.kv, self.telemetry)

    def worker_kind(self, pool: str) -> str:
        """Digest of all that a running worker of `pool` was started with, but its role: workers of
        equal kinds can take each other's."""
        own = replace(self.pools[pool], role=Role.COLOCATED.value)
        model = self.model_of(pool)
        return _revision(own, [model.id, model.dtype], self.kv, self.telemetry)

    def sized(self, workers: Mapping[str, int]) -> ClusterSpec:
        """The same with autoscaled pools of these sizes, as far as their bounds allow."""
        pools = {
            name: replace(pool, replicas=pool.autoscale.within(workers.get(name, pool.replicas)))
            if pool.autoscale
            else pool
            for name, pool in self.pools.items()
        }
        return replace(self, pools=MappingProxyType(pools))

    def model_of(self, pool: str) -> ModelSpec | NamedModelSpec:
        """The model that a pool serves."""
        return self.models[self.pools[pool].model] if self.models else self.model

    @property
    def pools_by_model(self) -> dict[str, dict[str, PoolSpec]]:
        """The pools of each of `models`; of "" where there is but one model."""
        found: dict[str, dict[str, PoolSpec]] = {name: {} for name in self.models or [""]}
        for name, pool in self.pools.items():
            found[pool.model][name] = pool
        return found

    @property
    def sources(self) -> dict[str, str]:
        """By the field that says it, each model's id: known, a path, or SIMULATED."""
        if not self.models:
            return {"model.id": self.model.id}
        return {f"models.{name}.id": model.id for name, model in self.models.items()}

    def any_family(self, source: str) -> bool:
        """Whether all engines that serve the model of that field know more models than this
        project."""
        name = source.removeprefix("models.").removesuffix(".id") if self.models else ""
        return all(pool.engine.any_family for pool in self.pools_by_model[name].values())

    @property
    def serving(self) -> Serving:
        """What clients may ask its gateways for, which may change while they run."""
        models = {
            name: ServedModel(model.id, model.aliases, model.tool_parser)
            for name, model in self.models.items()
        }
        routes = {name: tuple(map(_plain_rule, rules)) for name, rules in self.routes.items()}
        return Serving(models or {"": ServedModel(self.model.id)}, routes)

    def gateway_revision(self) -> str:
        """Differs where a gateway has to be replaced: with auth also where their number does, as
        each holds its share of the limits."""
        shares = self.gateway.replicas if self.auth.required else 1
        others = (self.model, bool(self.models), self.slo, self.telemetry, self.kv.block_size)
        return _revision(self.gateway, *others, self.auth, self.audit, self.prices, shares)

    def gateway_addresses(self, index: int) -> tuple[str, str]:
        """gRPC and HTTP address of gateway `index`: the ports count up, 0 stays 0."""
        return _offset(self.gateway.grpc, index), _offset(self.gateway.http, index)

    def claims(self) -> list[tuple[str, str]]:
        """Every address that is listened on, with its field. Raises ConfigError."""
        claimed = [("controller.grpc", self.controller.grpc)]
        for index in range(self.gateway.replicas):
            grpc, http = self.gateway_addresses(index)
            claimed += [("gateway.grpc", grpc), ("gateway.http", http)]
        return claimed


def plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, and tuples as lists."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def _plain_rule(rule: Rule) -> Rule:
    """With headers that can be sent to another process."""
    return replace(rule, when=replace(rule.when, header=dict(rule.when.header)))


def _offset(address: str, index: int) -> str:
    host, port = address.rpartition(":")[0], split_address(address)[1]
    if port and port + index > 65535:
        raise ConfigError("gateway.replicas", f"port + {index} of gateway {index} is above 65535")
    return f"{host}:{port + index if port else 0}"


def _revision(group: GatewaySpec | PoolSpec, *others: Any) -> str:
    own = plain(group)
    for not_the_members in ("replicas", "drain_s", "autoscale"):
        own.pop(not_the_members, None)
    text = json.dumps([own, *map(plain, others)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
