"""The gRPC front door: one server and its services."""

from __future__ import annotations

import errno
import socket
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import split_address
from crossdock.proto.v1 import inference_pb2, kserve_pb2
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.grpc_access import Guard
from crossdock.router.frontdoor.grpc_health import HEALTH, Health, add_reflection, renamed
from crossdock.router.frontdoor.grpc_inference import SERVICE, InferenceService
from crossdock.router.frontdoor.grpc_kserve import KSERVE, KServeService
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.tls import DoorCertificates

HARD_LIMIT_FACTOR = 8  # beyond this many times max_body_bytes gRPC itself refuses a message
GRPC_MOST = 2**31 - 1  # an int32
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a client that is cut off lives on
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class GrpcServer:
    """Serves models. `set_ready` is what health checks and watches see."""

    def __init__(
        self,
        models: Models,
        address: str,
        max_body_bytes: int,
        connection_age_s: float = 0.0,
        certificates: DoorCertificates | None = None,
    ) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes
        self._connection_age_s = connection_age_s  # 0: connections live as long as they will
        self._health = Health((SERVICE, KSERVE))
        self._certificates = certificates
        self._server: Any = None
        self.address = address

    async def start(self) -> None:
        """Raises ConfigError naming the port when it cannot be had."""
        self._server = server = grpc.aio.server(
            interceptors=[Guard(self._models.gate)], options=self._options()
        )
        inference = InferenceService(self._models, self._max_body_bytes)
        kserve = KServeService(self._models, self._max_body_bytes)
        server.add_generic_rpc_handlers((inference.handler(), kserve.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        files = (inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
        foreign = (renamed(kserve_pb2.DESCRIPTOR, KSERVE.rpartition(".")[0]),)
        add_reflection(server, (SERVICE, HEALTH, KSERVE), files, foreign)
        try:
            if self._certificates is None:
                bound = server.add_insecure_port(self.address)
            else:
                bound = server.add_secure_port(self.address, self._certificates.grpc())
        except RuntimeError as error:
            raise ConfigError(
                "gateway.grpc", f"{self.address}: {_bind_error(self.address)}"
            ) from error
        self.address = f"{self.address.rpartition(':')[0]}:{bound}"
        await server.start()

    def set_ready(self, ready: bool) -> None:
        """What grpc.health.v1 answers from now on."""
        self._health.set(ready)

    async def stop(self, grace_s: float) -> None:
        """Ends the server; calls under way get `grace_s` seconds."""
        if self._server is not None:
            self._health.set(False)
            await self._server.stop(grace_s)

    def _options(self) -> list[tuple[str, int]]:
        hard_limit = min(self._max_body_bytes * HARD_LIMIT_FACTOR, GRPC_MOST)
        options = [
            ("grpc.so_reuseport", 0),  # else a second gateway would share the port in silence
            ("grpc.max_receive_message_length", hard_limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.server_handshake_timeout_ms", int(1000 * http_limits.HEAD_S)),
            *KEEPALIVE,
        ]
        if self._connection_age_s:
            age_ms = min(int(1000 * self._connection_age_s), GRPC_MOST)
            options.append(("grpc.max_connection_age_ms", age_ms))  # streams under way may finish
        return options


def _bind_error(address: str) -> str:
    """Why gRPC cannot listen there: it does not say, so the system is asked again."""
    host, port = split_address(address)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        return f"port {port} is in use" if in_use else f"port {port}: {error.strerror}"
    return f"gRPC cannot listen on port {port}"
