"""Who a process of the cluster is, and how it proves it: mutual TLS under the cluster's authority.

A certificate says role, name and incarnation of its holder, twice: as a URI, which is what a server
knows a caller by, and as host names, by which a caller insists on the one that it means. A process
that was restarted has another incarnation, so it is another peer to TLS itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

CONTROLLER = "controller"
GATEWAY = "gateway"
OPERATOR = "operator"  # who runs the cluster: no process of it
MONITOR = "monitor"  # who reads the workers' metrics

_URI = re.compile(r"crossdock://([^/\s]+)/([a-z]+)/([^/\s]+)/([0-9a-f]{32})")


@dataclass(frozen=True)
class Peer:
    """What a certificate says of its holder."""

    cluster: str
    role: str  # controller, gateway, operator, monitor, or a worker's
    name: str
    incarnation: str  # hexadecimal, 32 characters

    @property
    def uri(self) -> str:
        """The whole of it."""
        return f"crossdock://{self.cluster}/{self.role}/{self.name}/{self.incarnation}"

    @property
    def host_names(self) -> tuple[str, ...]:
        """What a caller can insist on: this incarnation, or anybody of this role."""
        return host_name(self.incarnation), host_name(self.role)

    @classmethod
    def parse(cls, uri: str) -> Peer:
        """Raises ValueError for what is no such URI."""
        found = _URI.fullmatch(uri)
        if found is None:
            raise ValueError(f"{uri!r} names no process of a cluster")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


def host_name(whom: str) -> str:
    """The host name in the certificates of an incarnation, or of a role."""
    return f"{whom}.crossdock"


@dataclass(frozen=True)
class Identity:
    """A peer with the proof that it is this one. All PEM; the key never leaves its process."""

    peer: Peer
    key: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    authority: bytes = field(repr=False)  # certificates of who may sign its peers'


class Credentials:
    """The newest identity of this process, as gRPC and ssl take it. Safe to share between
    threads."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._client: tuple[Identity, grpc.ChannelCredentials] | None = None
        self._client_tls: tuple[Identity, ssl.SSLContext] | None = None

    @property
    def identity(self) -> Identity:
        """The newest."""
        return self._identity

    @property
    def peer(self) -> Peer:
        """Who this process is now; cluster and incarnation are the same in all of its
        identities."""
        return self._identity.peer

    def renew(self, identity: Identity) -> None:
        """New connections use it; those that are open live on. It may name another role, with
        another name, of the same process. Raises ValueError for another's."""
        mine, given = self.peer, identity.peer
        if (given.cluster, given.incarnation) != (mine.cluster, mine.incarnation):
            raise ValueError(f"{given.uri} is not {mine.uri}")
        self._identity = identity

    def client(self) -> grpc.ChannelCredentials:
        """For channels that are opened now: a channel keeps what it was opened with."""
        identity, known = self._identity, self._client
        if known is None or known[0] is not identity:
            proof = (identity.authority, identity.key, identity.certificate)
            self._client = known = identity, grpc.ssl_channel_credentials(*proof)
        return known[1]

    def client_tls(self) -> ssl.SSLContext:
        """The same for connections that are no channel's: they are to name their server by
        `host_name`, and talk HTTP/2 or nothing."""
        identity, known = self._identity, self._client_tls
        if known is None or known[0] is not identity:
            self._client_tls = known = identity, _client_context(identity)
        return known[1]

    def server(self) -> grpc.ServerCredentials:
        """For a port: who has no certificate of the authority does not get through the handshake.
        Each handshake is made with the newest identity."""
        told = self._identity

        def newest() -> Any:
            nonlocal told
            if told is self._identity:
                return None  # as it was
            told = self._identity
            return _configuration(told)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(told), newest, require_client_authentication=True
        )


def _client_context(identity: Identity) -> ssl.SSLContext:
    """Trusts the cluster's authority alone, and insists on the host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=identity.authority.decode())
    context.set_alpn_protocols(["h2"])
    with _private_file(identity.key + identity.certificate) as path:
        context.load_cert_chain(path)  # which comes from files alone
    return context


@contextlib.contextmanager
def _private_file(data: bytes) -> Iterator[str]:
    """The path of a file that nobody else can read; on Linux it is on no disk either."""
    if sys.platform == "linux":
        with open(os.memfd_create("identity"), "wb", buffering=0) as file:
            file.write(data)
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(buffering=0) as file:
            file.write(data)
            yield file.name


def _configuration(identity: Identity) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.certificate)], root_certificates=identity.authority
    )


async def admit(context: Any, credentials: Credentials | None, *roles: str) -> Peer | None:
    """Who calls, where it is of this cluster and has one of the roles; ends the call with
    PERMISSION_DENIED where not. None: this server has no credentials and asks for none."""
    if credentials is None:
        return None
    uris = context.auth_context().get("peer_uri", ())
    try:
        (uri,) = uris
        peer = Peer.parse(uri.decode())
    except ValueError:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the certificate names nobody")
        raise AssertionError("abort raises") from None
    if peer.cluster != credentials.peer.cluster:
        why = f"{peer} is of cluster {peer.cluster}, not {credentials.peer.cluster}"
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
    if peer.role not in roles:
        why = f"this call is for {' and '.join(roles)}; {peer} may not make it"
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
    return peer
