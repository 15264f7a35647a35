"""Settings of one gateway process."""

# ruff: noqa: RUF009  (setting() is dataclasses.field with documentation)
from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crossdock.model.store import NOWHERE
from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import GATEWAY_ADDRESS, check_settings, no_entries, setting
from crossdock.router.dispatch.admission import Limits
from crossdock.router.dispatch.lifecycle import Slo as Slo
from crossdock.router.dispatch.links import LinkSettings
from crossdock.router.placement.policy import ALIASES, ORDERED_BY_SLO, POLICIES, Policies
from crossdock.router.serving import TOOL_PARSERS, ServedModel, Serving


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
    keep_alive_s: float = setting(
        15.0,
        "How often a stream says that it lives until its first token; a proxy may close it else.",
        low=0.1,
        high=3600,
    )
    cors: str = setting(
        "", "Origins, separated by spaces, whose pages may call the API; * for any."
    )

    def __post_init__(self) -> None:
        check_settings(self, "gateway.http_options.")


@dataclass(frozen=True)
class ResponsesSettings:
    """The YAML's `responses` of a gateway: what is kept of /v1/responses, on two workers each."""

    ttl_s: float = setting(
        3600.0, "How long a response can be gone on from, or looked at.", low=1, high=2_592_000
    )
    max_tenant_mb: float = setting(
        64.0,
        "What one worker keeps of one tenant's, MB; the oldest make room.",
        low=0.01,
        high=65_536,
    )
    max_mb: float = setting(
        256.0,
        "What it keeps of all; who has the most makes room. Host memory beside the engine's.",
        low=0.01,
        high=1_048_576,
    )


@dataclass(frozen=True)
class TlsFiles:
    """The YAML's `tls` of a gateway: PEM files on each gateway's node."""

    cert: str = setting(
        "",
        "The front doors' certificate and those that lead from it to its authority. Empty: no TLS. "
        "All of these files are read again when they change.",
        kind="path",
    )
    key: str = setting("", "Its private key, not encrypted.", kind="path")
    client_ca: str = setting(
        "",
        "Authorities of clients: only who has a certificate of one gets through. Empty: all.",
        kind="path",
    )

    def __bool__(self) -> bool:
        return bool(self.cert)


@dataclass(frozen=True)
class KeyLimits:
    """What a credential may use; 0 is no limit. Where there are several gateways, each holds its
    share of these."""

    requests_per_minute: int = setting(
        0, "Requests within any 60 s; 0: no limit.", low=0, high=10_000_000
    )
    tokens_per_minute: int = setting(
        0,
        "Tokens of prompts and completions within any 60 s; 0: no limit.",
        low=0,
        high=10_000_000_000,
    )
    max_concurrent: int = setting(
        0, "Sequences (prompts × n) under way at once; 0: no limit.", low=0, high=1_000_000
    )
    max_context_tokens: int = setting(
        0, "Tokens of one sequence, prompt and completion; 0: no limit.", low=0, high=100_000_000
    )
    budget: float = setting(
        0.0,
        "What may be spent in a period, in the currency of prices; 0: no limit.",
        low=0,
        high=10**12,
    )
    budget_per: str = setting(
        "month", "The period of budget, by the calendar in UTC.", choices=("day", "month")
    )


@dataclass(frozen=True)
class JwtSettings:
    """The YAML's `auth.jwt`: bearer tokens that somebody else signs."""

    jwks: str = setting(
        "", "File of the signers' public keys (a JWK set). Empty: no JWTs.", kind="path"
    )
    issuer: str = setting("", "What a token's iss must be; needed with jwks.")
    audience: str = setting("", "What a token's aud must be or hold; needed with jwks.")
    tenant_claim: str = setting("tenant", "The claim that names the tenant.", kind="text")
    models_claim: str = setting(
        "models", "The claim that lists models by name; a token without it may use all."
    )
    leeway_s: float = setting(
        5.0, "How far clocks may differ where exp and nbf are checked.", low=0, high=300
    )
    max_priority: int = setting(
        0,
        "The most urgent (lowest) priority that a token's requests may have.",
        low=-(2**31),
        high=2**31 - 1,
    )
    shared_cache: bool = setting(
        False, "Whether these tenants share cached prefixes with others that do."
    )
    limits: KeyLimits = setting(factory=KeyLimits, doc="Limits of each tenant.")


@dataclass(frozen=True)
class AuthSettings:
    """The YAML's `auth`: who may use the front door. With neither keys nor jwt it is open, and a
    client is believed to be of the tenant that it names."""

    keys: str = setting(
        "", "File of API keys, made by crossdock keys; read again when it changes.", kind="path"
    )
    jwt: JwtSettings = setting(factory=JwtSettings, doc="Bearer tokens in place of keys, or too.")
    metrics: str = setting(
        "key",
        "Who may read GET /metrics where there is auth: key (those made with --metrics) or all.",
        choices=("key", "all"),
    )

    def check(self) -> None:
        """Raises ConfigError where something needed is left out."""
        for name in ("issuer", "audience"):
            if self.jwt.jwks and not getattr(self.jwt, name):
                raise ConfigError(f"auth.jwt.{name}", "is needed where auth.jwt.jwks is set")

    @property
    def required(self) -> bool:
        """Whether a request needs a credential."""
        return bool(self.keys or self.jwt.jwks)


@dataclass(frozen=True)
class AuditSettings:
    """The YAML's `audit`: a log with one line for each request."""

    file: str = setting(
        "",
        "Where it is; each gateway appends its name. Empty: there is none.",
        kind="path",
    )
    prompts: str = setting(
        "hash",
        "What it has of prompts and completions: SHA-256 of their token ids, or the ids as well "
        "(keep), which replay needs.",
        choices=("hash", "keep"),
    )
    on_full: str = setting(
        "refuse",
        "Where it cannot be written: refuse requests, or drop lines and count them.",
        choices=("refuse", "drop"),
    )
    rotate_mb: float = setting(
        100.0, "A file larger than this is renamed, and another begun.", low=0.001, high=1_000_000
    )


def probe_key(cluster_key: bytes) -> str:
    """The credential with which a cluster tries its own gateways."""
    return "xd-probe-" + hmac.digest(cluster_key, b"crossdock.probe.v1", "sha256").hex()


@dataclass(frozen=True)
class Price:
    """One entry of the YAML's `prices`: what a million tokens of a model cost."""

    input: float = setting(0.0, "A million prompt tokens that were computed.", low=0, high=10**9)
    cached: float = setting(0.0, "A million prompt tokens found in a cache.", low=0, high=10**9)
    output: float = setting(0.0, "A million generated tokens.", low=0, high=10**9)

    def cost(self, prompt: float, cached: float, generated: float) -> float:
        """Of so many tokens; `cached` are among those of the prompt."""
        computed = (prompt - cached) * self.input
        return (computed + cached * self.cached + generated * self.output) / 1_000_000


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
        "predicted_latency",
        "How workers are chosen: docs/architecture.md has a table. least_latency is an older name "
        "of predicted_latency.",
        choices=(*POLICIES, *ALIASES),
    )
    policies: Policies = field(default_factory=Policies)
    tool_parser: str = setting(
        "auto",
        "How the model writes calls of tools; auto: as its chat template does.",
        choices=TOOL_PARSERS,
    )
    block_size: int = setting(16, "Tokens of a block of the workers' pools.", low=1, high=65_536)
    max_body_mb: float = setting(8.0, "Largest HTTP body or gRPC message, MB.", low=0.01, high=1024)
    request_timeout_s: float = setting(
        600.0, "Deadline of a request that brings none, seconds.", low=0.1, high=86_400
    )
    http_options: HttpSettings = field(default_factory=HttpSettings)
    responses: ResponsesSettings = field(default_factory=ResponsesSettings)
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
    auth: AuthSettings = field(default_factory=AuthSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    audit_seed: bytes = field(default=b"\0" * 32, repr=False)  # signs it, 32 bytes
    prices: Mapping[str, Price] = field(default_factory=no_entries)  # by model
    serving: Serving = field(default_factory=Serving)  # at first; with models, `model` is empty
    cluster: str = ""  # its name; empty: what was used is not kept
    gateways: int = 1  # of the cluster; each holds its share of the limits of keys
    probe_key: str = field(default="", repr=False)  # with which `up` tries this gateway

    def __post_init__(self) -> None:
        check_settings(self, "gateway.")

    @property
    def first_serving(self) -> Serving:
        """What it serves until it is told otherwise: `model` alone has no name, but its files'."""
        return self.serving if self.serving.models else Serving({"": ServedModel(self.model)})

    @property
    def ttft_aim_s(self) -> float:
        """Within which a first token is to come, where that decides who of a tenant is next."""
        return self.slo.ttft_ms / 1000 if self._by_slo else math.inf

    @property
    def tpot_aim_s(self) -> float:
        """Within which a token is to follow another, where that decides who decodes."""
        return self.slo.tpot_ms / 1000 if self._by_slo else math.inf

    @property
    def _by_slo(self) -> bool:
        return ALIASES.get(self.policy, self.policy) in ORDERED_BY_SLO

    @property
    def max_body_bytes(self) -> int:
        """Larger requests are refused."""
        return int(self.max_body_mb * 1_000_000)
