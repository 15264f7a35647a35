"""Who asks: what a gateway knows of a client from its credential, before it reads a body."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from crossdock.proto.errors import Forbidden, InvalidRequest, show
from crossdock.proto.types import SamplingParams
from crossdock.router.config import KeyLimits
from crossdock.router.frontdoor.validate import UNLIMITED

LEAST_URGENT, MOST_URGENT = 2**31 - 1, -(2**31)
MOST_TENANT = 256  # characters of a tenant's name, which metrics, logs and accounts repeat


@dataclass(frozen=True)
class Principal:
    """What a credential says of its bearer. Priorities are numbers of which the lower run first,
    so `max_priority` is the lowest that may be asked for."""

    tenant: str
    key_id: str = ""  # never the key
    models: frozenset[str] = frozenset()  # that it may use; empty: all
    max_priority: int = 0
    shared_cache: bool = False  # cached prefixes are shared with others of whom the same is said
    limits: KeyLimits = field(default_factory=KeyLimits)
    metrics: bool = False  # may read the figures of all tenants
    expires: float | None = None  # Unix seconds
    trusting: bool = False  # there is no auth: who asks is believed
    account: str = ""  # whom limits are counted for: a key, or a tenant of bearer tokens
    address: str = ""  # of a client that need not say who it is

    @property
    def party(self) -> str:
        """Who takes turns with others, and has one share of the gateway's room."""
        return self.tenant or f"address {self.address}"

    def named(self, tenant: str) -> Principal:
        """The one for a request that names its tenant. A credential's tenant is never another than
        its own. Raises Forbidden."""
        if not tenant or tenant == self.tenant:
            return self
        if self.trusting:
            return replace(self, tenant=tenant)
        raise Forbidden(f"{show(tenant)} is not the tenant of this credential", "tenant")

    def priority(self, asked: int) -> int:
        """The priority of a request; 0 is what one that asks for none asks for. Raises
        Forbidden."""
        if self.trusting or asked >= self.max_priority:
            return asked
        if asked == 0:
            return self.max_priority
        limit = f"this credential's requests are at most as urgent as {self.max_priority}"
        raise Forbidden(f"{asked} is not allowed; {limit}", "priority")

    def may_use(self, model: str) -> bool:
        """Whether its models are all, or have this one."""
        return not self.models or model in self.models

    def check_model(self, names: Collection[str]) -> None:
        """Raises Forbidden where the model of these names is not one of its own."""
        if not any(self.may_use(name) for name in names):
            shown = next(iter(names))
            raise Forbidden(f"{shown!r} is not among the models of this credential", "model")

    def room(self, field: str, sampling: SamplingParams, prompt_tokens: int) -> int:
        """Tokens that a completion may have after such a prompt. Raises InvalidRequest where its
        longest context is exceeded."""
        most = self.limits.max_context_tokens
        if not most:
            return UNLIMITED
        limit = f"the context of this credential's requests is at most {most} tokens"
        if prompt_tokens >= most:
            raise InvalidRequest(field, f"{prompt_tokens} tokens", limit)
        if sampling.max_tokens != UNLIMITED and prompt_tokens + sampling.max_tokens > most:
            after = f"{limit}, {prompt_tokens} of which the prompt has"
            raise InvalidRequest("max_tokens", sampling.max_tokens, after)
        return most - prompt_tokens

    def cache_salt(self, salt: str) -> bytes:
        """The root that requests must share to find each other's cached prefixes: tenant and salt,
        told apart by their lengths, or salt alone among all who share. Where nobody says who he
        is, there is one root for all."""
        if self.shared_cache:
            return b"shared\0" + salt.encode()
        if not self.tenant and not salt:
            return b""
        tenant = self.tenant.encode()
        return b"private\0%d\0%b%b" % (len(tenant), tenant, salt.encode())
