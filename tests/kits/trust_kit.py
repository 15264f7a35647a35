"""Certificates for tests: of a cluster's authority, and what processes without any are given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

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


def door(company: Authority, life: timedelta = DAY) -> tuple[bytes, bytes]:
    """Key and certificate (PEM) of a front door at localhost and 127.0.0.1, from an authority that
    is none of a cluster's."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = x509.load_pem_x509_certificate(company.certificate)
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(company._key, SHA256())
    )
    private = (PrivateFormat.PKCS8, NoEncryption())
    return key.private_bytes(Encoding.PEM, *private), made.public_bytes(Encoding.PEM)
