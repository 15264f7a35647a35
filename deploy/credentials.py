"""The operator's credential: a file by which the controller takes Admin calls, and workers probes.

    cluster: local
    controller: 127.0.0.1:50050
    -----BEGIN PRIVATE KEY----- …

Key, certificate and authority, PEM. The controller keeps one beside the cluster's spec, so whoever
may read that folder is the operator; elsewhere a copy of the file serves.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from crossdock.deploy.authority import OPERATOR_LIFE, Authority, due, peer_in
from crossdock.deploy.home import crossdock_home
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError, CrossdockError
from crossdock.proto.identity import OPERATOR, Credentials, Identity
from crossdock.proto.settings import EVERY_HOST, split_address

if TYPE_CHECKING:
    from crossdock.deploy.controller import Controller

log = logging.getLogger(__name__)

LOOK_S = 30.0  # between two looks whether something is to be renewed
FILE = "operator.pem"

_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----\n?", re.DOTALL)
_LINE = re.compile(r"(cluster|controller): (\S+)")


@dataclass(frozen=True)
class Credential:
    """What is in such a file."""

    path: Path
    cluster: str
    controller: str  # host:port, as the controller says it
    identity: Identity


def write(authority: Authority, address: str) -> bytes:
    """A new one for the cluster whose controller answers at `address`."""
    identity = authority.issue(OPERATOR, OPERATOR, OPERATOR_LIFE)
    head = f"cluster: {authority.cluster}\ncontroller: {address}\n"
    return head.encode() + identity.key + identity.certificate + identity.authority


def read(path: Path) -> Credential:
    """Raises ConfigError for a file that is none, or whose certificate is over."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError("credential", f"{path}: {error.strerror}") from None
    said = dict(_LINE.findall(data.partition(b"-----")[0].decode("utf-8", "replace")))
    blocks = {kind: list[bytes]() for kind in (b"PRIVATE KEY", b"CERTIFICATE")}
    for block in _BLOCK.finditer(data):
        blocks.setdefault(block[1], []).append(block[0])
    try:
        (key,), (certificate, *authority) = blocks.values()
        found = x509.load_pem_x509_certificate(certificate)
        identity = Identity(peer_in(found), key, certificate, b"".join(authority))
    except ValueError:
        raise ConfigError("credential", f"{path} is no operator's credential") from None
    if found.not_valid_after_utc < datetime.now(UTC):
        ended = f"{found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        message = f"{path} was good until {ended}; the controller's node has a newer one"
        raise ConfigError("credential", message)
    return Credential(path, said.get("cluster", ""), said.get("controller", ""), identity)


def find(address: str, path: Path | None = None) -> Credentials:
    """Those of the file at `path`, or of what CROSSDOCK_HOME has for the controller at `address`.

    Raises ConfigError saying where it was looked for.
    """
    if path is not None:
        return Credentials(read(path).identity)
    folder = crossdock_home() / "clusters"
    here = list(_readable(sorted(folder.glob(f"*/{FILE}"))))
    fitting = [each for each in here if _same(each.controller, address)]
    if len(fitting or here) == 1:
        (only,) = fitting or here
        return Credentials(only.identity)
    raise ConfigError("credential", _not_found(address, folder, here))


def wanted(store: ClusterStore) -> bool:
    """Whether the store lacks one, or half of the life of its one is over."""
    try:
        return due(read(store.folder / FILE).identity.certificate)
    except ConfigError:
        return True


async def tend(controller: Controller, store: ClusterStore, address: str) -> None:
    """Renews the certificates of the controller, of operators and members, as long as it runs."""
    authority = controller.authority
    while True:
        authority.renew_own()
        try:
            if wanted(store):
                store.save(FILE, write(authority, address))
        except (OSError, CrossdockError) as error:
            log.warning("the operator's credential was not written: %s", error)
        renewals = [member.renew() for member in controller.members]
        for failure in await asyncio.gather(*renewals, return_exceptions=True):
            if isinstance(failure, Exception):  # whatever it is, the others' go on
                log.error("a certificate was not renewed", exc_info=failure)
        await asyncio.sleep(min(LOOK_S, authority.member_life.total_seconds() / 10))


def _readable(paths: Sequence[Path]) -> Iterator[Credential]:
    for path in paths:
        try:
            yield read(path)
        except ConfigError as error:
            log.info("%s", error)


def _same(listens: str, dialed: str) -> bool:
    """Whether who dials may reach a controller that says it listens there."""
    try:
        (host, port), (other, other_port) = split_address(listens), split_address(dialed)
    except ValueError:
        return False
    loopback = {"localhost", "127.0.0.1"}
    return port == other_port and (host == other or {host, other} <= loopback or host in EVERY_HOST)


def _not_found(address: str, folder: Path, here: Sequence[Credential]) -> str:
    why = f"{folder} has none for a controller at {address}"
    if here:
        known = ", ".join(f"{each.cluster} at {each.controller}" for each in here)
        why += f", but for {known}"
    return f"{why}: is its cluster up? elsewhere, copy {FILE} here and give --credential FILE"
