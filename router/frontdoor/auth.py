"""From a client's headers or metadata to a Principal, before its request is read."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from crossdock.proto.errors import Unauthenticated
from crossdock.router.config import AuthSettings, KeyLimits
from crossdock.router.frontdoor.bearer import parse_jwks, verify
from crossdock.router.frontdoor.keys import PREFIX, parse_keys
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.watched import WatchedFile

log = logging.getLogger(__name__)

POLL_S = 0.25  # a revoked key is refused within this, and the time of one read
KEPT_TOKENS = 4096  # verified bearer tokens that are not verified again
# `up`, which tries what it has started with a few tokens, and at a door whose certificate it takes
# as it is: the key is good for no more than that.
PROBE = Principal(
    "crossdock",
    "probe",
    account="probe",
    limits=KeyLimits(max_context_tokens=8, max_concurrent=4, requests_per_minute=600),
)

HELP = "send it as `Authorization: Bearer KEY`"


class Authenticator:
    """Knows the credentials of `settings`, and follows their files. Where there are none, everybody
    is let in under the tenant that he names."""

    def __init__(
        self,
        settings: AuthSettings,
        registry: CollectorRegistry,
        probe_key: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Reads the files. Raises ConfigError."""
        settings.check()
        self.settings = settings
        self._probe_key, self._clock = probe_key, clock
        self._keys = WatchedFile(settings.keys, parse_keys) if settings.keys else None
        self._signers = WatchedFile(settings.jwt.jwks, parse_jwks) if settings.jwt.jwks else None
        self._files: list[WatchedFile[Any]] = [f for f in (self._keys, self._signers) if f]
        self._verified: dict[bytes, Principal] = {}  # by digest of the token, the oldest first
        self._reads = Counter(
            "crossdock_credential_reads",
            "Changes of the files of credentials, by whether they could be read",
            ["result"],
            registry=registry,
        )
        stale = Gauge(
            "crossdock_credential_files_stale",
            "Files of credentials that are broken or gone; what they said before is in force",
            registry=registry,
        )
        stale.set_function(lambda: sum(file.stale for file in self._files))

    @property
    def required(self) -> bool:
        """Whether a request needs a credential."""
        return self.settings.required

    def authenticate(self, headers: Mapping[str, str], client: str) -> Principal:
        """Who asks from address `client`. `headers` are looked up in lower case. Raises
        Unauthenticated."""
        if not self.required:
            return Principal("", trusting=True, address=_network(client))
        credential = _credential(headers)
        if self._probe_key and hmac.compare_digest(
            credential.encode("utf-8", "replace"), self._probe_key.encode()
        ):
            return PROBE
        principal = self._found(credential)
        if principal.expires is not None and self._clock() >= principal.expires:
            raise Unauthenticated("the credential has expired")
        return principal

    def _found(self, credential: str) -> Principal:
        if self._keys is not None and (credential.startswith(PREFIX) or self._signers is None):
            principal = self._keys.value.find(credential)
            if principal is None:
                raise Unauthenticated("the API key is not known here")
            return principal
        if self._signers is None:
            raise Unauthenticated("the API key is not known here")
        name = hashlib.sha256(credential.encode("utf-8", "surrogateescape")).digest()
        principal = self._verified.get(name)
        if principal is None:
            principal = verify(credential, self._signers.value, self.settings.jwt)
            self._verified[name] = principal
            if len(self._verified) > KEPT_TOKENS:
                del self._verified[next(iter(self._verified))]
        return principal

    async def watch(self) -> None:
        """Follows the files until it is cancelled."""
        while self._files:
            await asyncio.sleep(POLL_S)
            try:
                if await asyncio.to_thread(self.poll):
                    self._verified.clear()
            except Exception:  # whatever it is, the next change is to be seen
                log.exception("the files of credentials could not be followed")

    def poll(self) -> bool:
        """Reads what has changed; whether anything has. May wait for the disk."""
        changes = [taken for file in self._files if (taken := file.poll()) is not None]
        for taken in changes:
            self._reads.labels("ok" if taken else "failed").inc()
        return bool(changes)


def _credential(headers: Mapping[str, str]) -> str:
    given = headers.get("authorization", "")
    if given:
        scheme, _, credential = given.partition(" ")
        if scheme.lower() != "bearer" or not credential.strip():
            raise Unauthenticated(f"Authorization must be a bearer's; {HELP}", missing=True)
        return credential.strip()
    if key := headers.get("x-api-key", "").strip():
        return key
    raise Unauthenticated(f"an API key is needed; {HELP}", missing=True)


@functools.lru_cache(maxsize=4096)
def _network(client: str) -> str:
    """The address that counts as one client: of IPv6 a whole /64, which is one customer's."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
