"""Health over gRPC as Kubernetes asks for it: by gRPC's own health client and, where it is on this
machine, by grpc_health_probe. No key is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc
from checking import CA, GRPC, check, command, raises, run
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

PROBE = "grpc_health_probe"
SERVICE = "crossdock.v1.Inference"
SERVING = HealthCheckResponse.SERVING
TIMEOUT_S = 20.0
# What the probe ends with.
NOT_CONNECTED, NOT_ANSWERED, NOT_SERVING = 2, 3, 4


def channel() -> grpc.Channel:
    if not CA:
        return grpc.insecure_channel(GRPC)
    return grpc.secure_channel(GRPC, grpc.ssl_channel_credentials(Path(CA).read_bytes()))


def exit_code(service: str = "") -> int:
    """What grpc_health_probe would end with: one Check, on a connection of its own."""
    with channel() as dialed:
        try:
            grpc.channel_ready_future(dialed).result(TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return NOT_CONNECTED
        try:
            answer = HealthStub(dialed).Check(
                HealthCheckRequest(service=service), timeout=TIMEOUT_S
            )
        except grpc.RpcError:
            return NOT_ANSWERED
        return 0 if answer.status == SERVING else NOT_SERVING


@check
def probed() -> None:
    """Check of the server and of a service, by the probe's call and with its exit codes"""
    assert exit_code() == exit_code(SERVICE) == 0
    assert exit_code("no.such.Service") == NOT_ANSWERED


@check
def unknown() -> None:
    """NOT_FOUND for a service that is not here"""
    with channel() as dialed:
        asked = HealthCheckRequest(service="no.such.Service")
        error = raises(grpc.RpcError, lambda: HealthStub(dialed).Check(asked, timeout=TIMEOUT_S))
        assert error.code() is grpc.StatusCode.NOT_FOUND, error


@check
def watched() -> None:
    """Watch, which says at once how it is"""
    with channel() as dialed:
        for service, status in ((SERVICE, SERVING), ("no", HealthCheckResponse.SERVICE_UNKNOWN)):
            call = HealthStub(dialed).Watch(HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert next(call).status == status, service
            call.cancel()


def probe() -> None:
    """grpc_health_probe itself"""
    words = (PROBE, f"-addr={GRPC}", *(("-tls", f"-tls-ca-cert={CA}") if CA else ()))
    assert command(*words) is not None
    assert command(*words, f"-service={SERVICE}") is not None


if shutil.which(PROBE):
    check(probe)

if __name__ == "__main__":
    run()
