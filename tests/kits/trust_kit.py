"""Certificates for tests: of a cluster's authority, and what processes without any are given."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from crossdock.deploy.authority import Applicant, Authority
from crossdock.proto.identity import Credentials

CLUSTER = "test"
AUTHORITY = Authority(b"a key of this test cluster", CLUSTER)
DAY = timedelta(days=1)


def credentials(
    role: str, name: str = "", authority: Authority = AUTHORITY, life: timedelta = DAY
) -> Credentials:
    """Those of a process that the authority's controller launched."""
    return Credentials(authority.issue(role, name or f"{role}-0", life))


class Applies:
    """A member's half of its certification, for fake processes."""

    def __init__(self) -> None:
        self.applicant = Applicant()
        self.identities: list[Any] = []

    async def request_certificate(self) -> bytes:
        return self.applicant.request()

    async def certify(self, certificate: bytes, authority: bytes) -> None:
        self.identities.append(self.applicant.accept(certificate, authority))


class Uncertified:
    """A fake process that has no use for certificates."""

    async def request_certificate(self) -> bytes:
        return b""

    async def certify(self, certificate: bytes, authority: bytes) -> None:
        pass


# For the controller of processes that speak plain gRPC.
NO_AUTHORITY: Any = SimpleNamespace(controller=None, certificate=b"", sign=lambda *_: b"")
