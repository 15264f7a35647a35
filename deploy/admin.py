"""What operators ask of a running cluster, as plain calls. `address` is the controller's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc

from crossdock.deploy.spec import ClusterSpec, ControllerSpec
from crossdock.deploy.spec_yaml import locate
from crossdock.proto.errors import ConfigError, CrossdockError, NotFound, Unavailable
from crossdock.proto.v1 import admin_pb2, admin_pb2_grpc

DEFAULT_ADDRESS = ControllerSpec().grpc
MAX_STATUS_BYTES = 64 << 20


def status(
    address: str = DEFAULT_ADDRESS, check_integrity: bool = False, timeout_s: float = 15.0
) -> admin_pb2.ClusterStatus:
    """Raises Unavailable when no controller answers there."""
    request = admin_pb2.GetClusterStatusRequest(check_integrity=check_integrity)
    with _admin(address) as stub:
        answer: admin_pb2.ClusterStatus = stub.GetClusterStatus(request, timeout=timeout_s)
    return answer


def apply(
    path: str | Path,
    address: str = "",
    dry_run: bool = False,
    wait: bool = True,
    timeout_s: float = 600.0,
) -> admin_pb2.ApplyResponse:
    """Has the cluster become what the file says; its own controller.grpc where no address is.

    Raises ConfigError naming file, line and field; Unavailable when no controller answers.
    """
    spec = ClusterSpec.load(path)
    request = admin_pb2.ApplyRequest(
        yaml=spec.to_yaml(), file=str(path), dry_run=dry_run, wait=wait, timeout_s=timeout_s
    )
    try:
        with _admin(address or spec.controller.grpc) as stub:
            answer: admin_pb2.ApplyResponse = stub.Apply(request, timeout=timeout_s + 30)
    except ConfigError as error:
        text = Path(path).read_text(encoding="utf-8")
        raise error.at(locate(text, str(path), error.field)) from None
    return answer


def scale(
    pool: str,
    replicas: int,
    address: str = DEFAULT_ADDRESS,
    wait: bool = True,
    timeout_s: float = 600.0,
) -> admin_pb2.ApplyResponse:
    """Raises ConfigError for an unknown pool or a number that is not allowed."""
    request = admin_pb2.ScaleRequest(pool=pool, replicas=replicas, wait=wait, timeout_s=timeout_s)
    with _admin(address) as stub:
        answer: admin_pb2.ApplyResponse = stub.Scale(request, timeout=timeout_s + 30)
    return answer


def down(address: str = DEFAULT_ADDRESS, drain_s: float = 10.0) -> None:
    """Ends the cluster; its gateways may finish their requests for `drain_s`."""
    with _admin(address) as stub:
        stub.Down(admin_pb2.DownRequest(drain_s=drain_s), timeout=drain_s + 60)


@contextlib.contextmanager
def _admin(address: str) -> Iterator[admin_pb2_grpc.AdminStub]:
    options = [("grpc.max_receive_message_length", MAX_STATUS_BYTES)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            yield admin_pb2_grpc.AdminStub(channel)
        except grpc.RpcError as error:
            raise _translated(address, error) from None


def _translated(address: str, error: grpc.RpcError) -> CrossdockError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"no controller answers at {address} ({details})")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        field, _, message = details.partition(": ")
        return ConfigError(field, message)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(details)
    return CrossdockError(f"{code.name}: {details}")
