"""Settings of one gateway process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from crossdock.model.store import NOWHERE
from crossdock.proto.settings import GATEWAY_ADDRESS, check_settings, setting
from crossdock.router.dispatch.admission import Limits
from crossdock.router.dispatch.lifecycle import Slo as Slo
from crossdock.router.dispatch.links import LinkSettings
from crossdock.router.placement.policy import POLICIES


@dataclass(frozen=True)
class HttpSettings:
    """The YAML's `http_options`: how OpenAI HTTP is served."""

    strict: bool = setting(
        False, "Refuse fields of bodies that are not known, by name, instead of ignoring them."
    )
    max_reading_mb: float = setting(
        64.0,
        "What all bodies that are being read may hold together, MB; the oldest makes room.",
        low=0.01,
        high=65_536,
    )

    def __post_init__(self) -> None:
        check_settings(self, "gateway.http_options.")


@dataclass(frozen=True)
class TlsFiles:
    """The YAML's `tls` of a gateway: PEM files on each gateway's node."""

    cert: str = setting(
        "",
        "The front doors' certificate and those that lead from it to its authority. Empty: no TLS. "
        "All of these files are read again when they change; a path that begins with . is taken "
        "from this file's folder.",
    )
    key: str = setting("", "Its private key, not encrypted.")
    client_ca: str = setting(
        "", "Authorities of clients: only who has a certificate of one gets through. Empty: all."
    )

    def __bool__(self) -> bool:
        return bool(self.cert)


@dataclass(frozen=True)
class GatewayConfig(Limits):
    """Everything a gateway needs to start.

    What has a documentation here can be said in the YAML, which is checked by it.
    """

    name: str
    model: str  # a known id, a folder, or a .gguf file
    hash_key: bytes = field(repr=False)  # of the cluster's block hashes
    home: Path = NOWHERE  # where fetched models and digests are
    grpc: str = setting(GATEWAY_ADDRESS, "Where gRPC is served.", kind="address")
    http: str = setting("127.0.0.1:8000", "Where OpenAI HTTP is served.", kind="address")
    policy: str = setting(
        "least_latency",
        "How workers are chosen: by predicted latency (queue depth and prefix hits), or in turn.",
        choices=tuple(POLICIES),
    )
    block_size: int = setting(16, "Tokens of a block of the workers' pools.", low=1, high=65_536)
    max_body_mb: float = setting(8.0, "Largest HTTP body or gRPC message, MB.", low=0.01, high=1024)
    request_timeout_s: float = setting(
        600.0, "Deadline of a request that brings none, seconds.", low=0.1, high=86_400
    )
    http_options: HttpSettings = field(default_factory=HttpSettings)
    tls: TlsFiles = field(default_factory=TlsFiles)
    max_connection_age_s: float = setting(
        0.0,
        "After how long a gRPC connection is asked to be made anew, so that load balancers spread "
        "clients again; its streams may finish. 0: never.",
        low=0,
        high=2_000_000,
    )
    slo: Slo = field(default_factory=Slo)
    links: LinkSettings = field(default_factory=LinkSettings)

    def __post_init__(self) -> None:
        check_settings(self, "gateway.")

    @property
    def max_body_bytes(self) -> int:
        """Larger requests are refused."""
        return int(self.max_body_mb * 1_000_000)
