"""Settings of one worker process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crossdock.proto.errors import ConfigError
from crossdock.proto.types import Role

RESERVE = ("early", "late")  # when a decode worker sets blocks aside: as the prompt is computed
VERIFY = ("fence", "checksum")  # what is compared before a sequence joins on pulled KV


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker needs to start. Sizes in tokens, blocks or MiB; times in seconds."""

    name: str
    pool: str
    role: Role
    model: str
    cluster_key: bytes = field(repr=False)
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    kv_blocks: int = 0  # 0: as many as kv_memory_mb holds
    kv_memory_mb: int = 512
    transport: str = "nixl"
    transport_options: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    lease_s: float = 30.0
    pull_timeout_s: float = 10.0
    reserve: str = "early"
    verify: str = "fence"
    max_batch: int = 64
    max_waiting: int = 1024
    chunk_tokens: int = 256
    revision: str = ""
    node_id: str = ""
    telemetry: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        positive = ("threads", "max_batch", "max_waiting", "chunk_tokens", "kv_memory_mb")
        for name in (*positive, "lease_s", "pull_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} must be greater than 0")
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError("block_size", f"{self.block_size} must be 8, 16, 32, 64 or 128")
        for name, choices in (("reserve", RESERVE), ("verify", VERIFY)):
            if getattr(self, name) not in choices:
                raise ConfigError(name, f"{getattr(self, name)!r} is not one of {choices}")
        if len(self.cluster_key) < 16:
            raise ConfigError("cluster_key", f"{len(self.cluster_key)} bytes; at least 16")
