"""TLS at the front doors: certificate files, read again when they change.

Both doors look at the files at each handshake, so a new certificate needs no restart, and each
handshake is made with one that was whole: files that cannot be used, as between the change of the
certificate and that of its key, leave the last ones in force and say so once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from crossdock.proto.errors import ConfigError
from crossdock.router.config import TlsFiles
from crossdock.router.frontdoor.http_limits import HEAD_S

log = logging.getLogger(__name__)

HTTP, GRPC = "http/1.1", "h2"


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What the files held at one time, for either door."""

    http: ssl.SSLContext
    grpc: ssl.SSLContext


class DoorCertificates:
    """The certificate of one gateway's doors, as its files have it. Safe between threads.

    Raises ConfigError where they cannot be used to begin with. `authority` (PEM) is one that may
    sign for clients beside `client_ca`: the cluster's own, whose operator proves a first request.
    """

    def __init__(self, files: TlsFiles, authority: bytes = b"") -> None:
        self._files = files
        self._paths = [Path(each) for each in (files.cert, files.key, files.client_ca) if each]
        self._authority = authority
        self._stamp = self._look()
        try:
            self._loaded = self._load()
        except (OSError, ValueError) as error:
            raise ConfigError("gateway.tls", self._words(error)) from None

    def http(self) -> ssl.SSLContext:
        """For the listening socket of HTTP."""
        return self._door(HTTP, lambda: self._newest().http)

    def grpc(self) -> ssl.SSLContext:
        """For that of gRPC."""
        return self._door(GRPC, lambda: self._newest().grpc)

    def _door(self, protocol: str, newest: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """One that turns to the newest at each handshake."""

        def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = newest()

        door = self._context(protocol, b"")
        door.sni_callback = choose  # called without a server name as well
        return door

    def _newest(self) -> _Loaded:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp  # what does not work is tried once
            try:
                self._loaded = self._load()
                log.info("gateway.tls: %s is in force", self._files.cert)
            except (OSError, ValueError) as error:
                log.error("%s; the certificate before stays in force", self._words(error))
        return self._loaded

    def _look(self) -> list[tuple[int, int, int]]:
        """What tells the files from those before; empty entries where one is missing."""
        found = []
        for path in self._paths:
            try:
                about = os.stat(path)
                found.append((about.st_ino, about.st_size, about.st_mtime_ns))
            except OSError:
                found.append((0, 0, 0))
        return found

    def _load(self) -> _Loaded:
        roots = b""
        if self._files.client_ca:
            roots = Path(self._files.client_ca).read_bytes() + self._authority
        return _Loaded(self._context(HTTP, roots), self._context(GRPC, roots))

    def _context(self, protocol: str, roots: bytes) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([protocol])
        context.load_cert_chain(self._files.cert, self._files.key, password=_no_password)
        if self._files.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            # Who resumes a session is not verified again, whatever the files say by then: so there
            # are no tickets, and no TLS 1.2, whose cache of sessions cannot be turned off here.
            context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 0
        if roots:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        return context

    def _words(self, error: Exception) -> str:
        why = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        return f"gateway.tls: {', '.join(map(str, self._paths))} cannot be used: {why}"


def _no_password() -> str:
    raise ValueError("the key is encrypted, and there is nobody to ask for its password")


class TlsSite(web.BaseSite):
    """As aiohttp's TCPSite, but who does not get on with the handshake is not waited for."""

    def __init__(self, runner: Any, host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(runner, ssl_context=context)
        self._where = host, port

    @property
    def name(self) -> str:
        """Its URL."""
        return f"https://{self._where[0]}:{self._where[1]}"

    async def start(self) -> None:
        """Raises OSError where the port cannot be had."""
        await super().start()
        loop = asyncio.get_running_loop()
        protocols: Any = self._runner.server
        self._server = await loop.create_server(
            protocols, *self._where, ssl=self._ssl_context, ssl_handshake_timeout=HEAD_S
        )
