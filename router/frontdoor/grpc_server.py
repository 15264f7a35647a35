"""The gRPC front door: one server and its services."""

from __future__ import annotations

import errno
import os
from functools import partial

from grpc_health.v1 import health_pb2, health_pb2_grpc

from crossdock.proto.errors import ConfigError
from crossdock.proto.v1 import inference_pb2, kserve_pb2
from crossdock.router.frontdoor.grpc_access import admit
from crossdock.router.frontdoor.grpc_calls import refuse
from crossdock.router.frontdoor.grpc_health import HEALTH, Health, add_reflection, renamed
from crossdock.router.frontdoor.grpc_inference import SERVICE, InferenceService
from crossdock.router.frontdoor.grpc_kserve import KSERVE, KServeService
from crossdock.router.frontdoor.http2.server import Server
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.tls import DoorCertificates

HARD_LIMIT_FACTOR = 8  # beyond this many times max_body_bytes a message is not even read
LARGE = (  # methods that take more than a line
    *(f"/{SERVICE}/{name}" for name in ("Generate", "GenerateUnary")),
    *(f"/{KSERVE}/{name}" for name in ("ModelInfer", "ModelStreamInfer")),
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
        self._server: Server | None = None
        self.address = address

    async def start(self) -> None:
        """Raises ConfigError naming the port when it cannot be had."""
        self._server = server = Server(
            partial(admit, self._models.gate),
            refuse,
            dict.fromkeys(LARGE, self._max_body_bytes * HARD_LIMIT_FACTOR),
            self._connection_age_s,
        )
        inference = InferenceService(self._models, self._max_body_bytes)
        kserve = KServeService(self._models, self._max_body_bytes)
        server.add_generic_rpc_handlers((inference.handler(), kserve.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        files = (inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
        foreign = (renamed(kserve_pb2.DESCRIPTOR, KSERVE.rpartition(".")[0]),)
        add_reflection(server, (SERVICE, HEALTH, KSERVE), files, foreign)
        tls = None if self._certificates is None else self._certificates.grpc()
        try:
            bound = await server.listen(self.address, tls)
        except OSError as error:
            raise ConfigError("gateway.grpc", f"{self.address}: {_why(error)}") from error
        self.address = f"{self.address.rpartition(':')[0]}:{bound}"

    def set_ready(self, ready: bool) -> None:
        """What grpc.health.v1 answers from now on."""
        self._health.set(ready)

    async def stop(self, grace_s: float) -> None:
        """Ends the server; calls under way get `grace_s` seconds."""
        if self._server is not None:
            self._health.set(False)
            await self._server.stop(grace_s)


def _why(error: OSError) -> str:
    """Why a port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return "the port is in use"
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
