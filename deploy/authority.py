"""The cluster's authority: signs the certificates by which its processes know each other.

Its key is made of the cluster's key, which the controller alone has, so whichever controller has
that goes on signing. Certificates live for a day and are renewed at half their life. What proves a
member stays with it: it makes a key, asks for a certificate of it, and tells nobody the key.
"""

from __future__ import annotations

import hmac
import re
import secrets
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crossdock.proto.identity import CONTROLLER, GATEWAY, OPERATOR, Credentials, Identity, Peer

CURVE = ec.SECP256R1()
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of the curve's group
MEMBER_LIFE = timedelta(hours=24)
OPERATOR_LIFE = timedelta(days=30)
AUTHORITY_LIFE = timedelta(days=3650)
SKEW = timedelta(minutes=10)  # that a peer's clock may be behind the controller's

_INCARNATION = re.compile("[0-9a-f]{32}")


def workers_key(cluster_key: bytes) -> bytes:
    """What workers get of the cluster's key, 32 bytes: it signs tickets, but no certificates."""
    return hmac.digest(cluster_key, b"crossdock.workers.v1", "sha256")


def gateways_key(cluster_key: bytes) -> bytes:
    """What gateways' keys that workers have no part in are made of, 32 bytes: those of audit logs,
    and of trying a gateway."""
    return hmac.digest(cluster_key, b"crossdock.gateways.v1", "sha256")


class Authority:
    """Signs for one cluster. `certificate` (PEM) is what its members trust; `controller` are the
    credentials of the controller itself."""

    def __init__(
        self, cluster_key: bytes, cluster: str, member_life: timedelta = MEMBER_LIFE
    ) -> None:
        self.cluster = cluster
        self.member_life = member_life
        self._key = _derived(cluster_key)
        name = _named(f"crossdock {cluster}")
        builder = _certificate(name, name, self._key.public_key(), AUTHORITY_LIFE)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_key_usage(signs=True), True)
        self._key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        builder = builder.add_extension(self._key_id, False)
        self._own = builder.sign(self._key, hashes.SHA256())
        self.certificate = _pem(self._own)
        self.controller = self.credentials(CONTROLLER, CONTROLLER)

    def sign(self, request: bytes, role: str, name: str) -> bytes:
        """The certificate (PEM) of a member's request: it says who it is in the controller's words,
        not the request's, which brings key and incarnation. Raises ValueError."""
        asked = x509.load_pem_x509_csr(request)
        (subject,) = asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        public, incarnation = asked.public_key(), str(subject.value)
        if not isinstance(public, ec.EllipticCurvePublicKey) or not asked.is_signature_valid:
            raise ValueError("the request is not signed by its key, or that is of another kind")
        if not _INCARNATION.fullmatch(incarnation):
            raise ValueError(f"{incarnation!r} is no incarnation")
        peer = Peer(self.cluster, role, name, incarnation)
        return self._sign(peer, public, self.member_life)

    def issue(self, role: str, name: str, life: timedelta) -> Identity:
        """An identity whose key is made here: for the controller itself, and for operators."""
        return self.renewed(Peer(self.cluster, role, name, secrets.token_hex(16)), life)

    def credentials(self, role: str, name: str) -> Credentials:
        """Those of a process of that role, for tests and tools that are one themselves."""
        return Credentials(self.issue(role, name, self.member_life))

    def renewed(self, peer: Peer, life: timedelta) -> Identity:
        """The same peer's next one, with a key of its own."""
        key = ec.generate_private_key(CURVE)
        certificate = self._sign(peer, key.public_key(), life)
        return Identity(peer, _key_pem(key), certificate, self.certificate)

    def renew_own(self) -> None:
        """The controller's certificate, once half of its life is over."""
        if due(self.controller.identity.certificate):
            self.controller.renew(self.renewed(self.controller.peer, self.member_life))

    def _sign(self, peer: Peer, public: ec.EllipticCurvePublicKey, life: timedelta) -> bytes:
        who = _named(f"{peer.role} {peer.name}"[:64])
        builder = _certificate(who, self._own.subject, public, life)
        names = [x509.UniformResourceIdentifier(peer.uri), *map(x509.DNSName, peer.host_names)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(_key_usage(signs=False), True)
        signer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._key_id)
        builder = builder.add_extension(signer, False)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if peer.role not in (OPERATOR, GATEWAY):  # those serve nobody under this authority
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), False)
        return _pem(builder.sign(self._key, hashes.SHA256()))


class Applicant:
    """A member's side: keys that stay in this process, and the incarnation that all are for."""

    def __init__(self) -> None:
        self.incarnation = secrets.token_hex(16)
        self._key: ec.EllipticCurvePrivateKey | None = None

    def request(self) -> bytes:
        """Asks (PEM) for a certificate of a new key; the request before is void."""
        self._key = ec.generate_private_key(CURVE)
        builder = x509.CertificateSigningRequestBuilder().subject_name(_named(self.incarnation))
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    def accept(self, certificate: bytes, authority: bytes) -> Identity:
        """The identity that the answer to the last request makes. Raises ValueError where it is
        the answer to another."""
        found = x509.load_pem_x509_certificate(certificate)
        if self._key is None or found.public_key() != self._key.public_key():
            raise ValueError("the certificate is not of the key that was asked for last")
        peer = peer_in(found)
        if peer.incarnation != self.incarnation:
            raise ValueError(f"the certificate is of {peer.incarnation}, not {self.incarnation}")
        return Identity(peer, _key_pem(self._key), certificate, authority)


def peer_in(certificate: x509.Certificate) -> Peer:
    """Whom a certificate names. Raises ValueError where that is nobody of a cluster."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        raise ValueError("the certificate names nobody of a cluster") from None
    return Peer.parse(uri)


def due(certificate: bytes) -> bool:
    """Whether half of the life of a certificate (PEM) that was signed here is over."""
    found = x509.load_pem_x509_certificate(certificate)
    begins, ends = found.not_valid_before_utc + SKEW, found.not_valid_after_utc
    return datetime.now(UTC) >= begins + (ends - begins) / 2


def _derived(cluster_key: bytes) -> ec.EllipticCurvePrivateKey:
    """48 bytes of key material reduced to the group's order, as in FIPS 186-5, A.2.1."""
    info = b"crossdock.authority.v1"
    material = HKDF(hashes.SHA256(), 48, salt=None, info=info).derive(cluster_key)
    return ec.derive_private_key(int.from_bytes(material, "big") % (ORDER - 1) + 1, CURVE)


def _certificate(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + life)
    )


def _key_usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
