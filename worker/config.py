"""Settings of one worker process."""

# ruff: noqa: RUF009  (setting() is dataclasses.field with documentation)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crossdock.engine.contract import EngineConfig
from crossdock.engine.contract import EngineSettings as EngineSettings
from crossdock.engine.registry import ENGINES as ENGINES
from crossdock.engine.registry import settings_of as settings_of
from crossdock.kvtransfer.ucx import check_ucx
from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import check_settings, no_entries, setting
from crossdock.proto.types import Role


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(EngineConfig):
    """Everything a worker needs to start. Sizes in tokens, blocks or MB; times in seconds.

    What has a documentation here can be said in the YAML, which is checked by it.
    """

    name: str
    pool: str
    role: Role
    cluster_key: bytes = field(repr=False)
    engine: EngineSettings = setting(
        factory=lambda: settings_of("native")(), doc="What computes here, and its own settings."
    )
    transport: str = setting(
        "nixl",
        "What moves KV blocks: nixl (RDMA, NVLink, TCP, shared memory), nccl (between GPUs, for "
        "clusters without RDMA) or local (one host).",
        choices=("nixl", "nccl", "local"),
    )
    transport_options: Mapping[str, str] = setting(
        factory=no_entries,
        doc="UCX settings for workers, without the prefix: {TLS: tcp} sets UCX_TLS=tcp. Only what "
        "tunes a transport: TLS, NET_DEVICES, TCP_*, IB_*, RC_*, UD_*, RNDV_*, ….",
        check=check_ucx,
    )
    lease_s: float = setting(
        30.0, "How long offered KV stays pinned without a renewal.", low=0.1, high=3600
    )
    pull_timeout_s: float = setting(
        10.0,
        "How long reading KV may take before the request is prefilled elsewhere.",
        low=0.1,
        high=3600,
    )
    reserve: str = setting(
        "early",
        "When a decode worker sets blocks aside: early, to pull a prompt's KV while the rest of it "
        "is computed; late, once it is computed.",
        choices=("early", "late"),
    )
    verify: str = setting(
        "fence",
        "What pulled KV must pass: fence, that no block had another owner meanwhile; checksum, "
        "that its bytes are those sent as well; on a GPU that needs cupy.",
        choices=("fence", "checksum"),
    )
    max_waiting: int = setting(1024, "Sequences that wait beside them.", low=1, high=1_000_000)
    host: str = "127.0.0.1"
    port: int = 0
    revision: str = ""
    node_id: str = ""

    def __post_init__(self) -> None:
        check_settings(self)
        if len(self.cluster_key) < 16:
            raise ConfigError("cluster_key", f"{len(self.cluster_key)} bytes; at least 16")
