"""What operators ask of a running cluster, as plain calls. `address` is the controller's, whose
credential CROSSDOCK_HOME has where no file of one is given."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from crossdock.deploy import credentials
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.spec_yaml import locate
from crossdock.proto.channels import open_blocking_channel
from crossdock.proto.errors import ConfigError, CrossdockError, NotFound, Overtaken, Unavailable
from crossdock.proto.identity import CONTROLLER
from crossdock.proto.settings import CONTROLLER_ADDRESS, split_address
from crossdock.proto.v1 import admin_pb2, admin_pb2_grpc

MAX_STATUS_BYTES = 64 << 20
PROGRESS_S = 2.0
ANSWER_S = 120.0  # longer than a gateway's trial

Progress = Callable[[str], None]


def status(
    address: str = CONTROLLER_ADDRESS,
    check_integrity: bool = False,
    timeout_s: float = 15.0,
    listening: bool = False,
    credential: Path | None = None,
) -> admin_pb2.ClusterStatus:
    """Raises Unavailable when no controller answers there, ConfigError without a credential.
    `listening`: with the ports."""
    request = admin_pb2.GetClusterStatusRequest(
        check_integrity=check_integrity, listening=listening
    )
    with _admin(address, credential) as stub:
        answer: admin_pb2.ClusterStatus = stub.GetClusterStatus(request, timeout=timeout_s)
    return answer


def explain(
    request_id: str,
    address: str = CONTROLLER_ADDRESS,
    timeout_s: float = 15.0,
    credential: Path | None = None,
) -> admin_pb2.ExplainedRequest:
    """Where a request, by its id or its answer's, was placed, why, and what it took. Raises
    NotFound where no gateway knows it, or not any more, and as `status`."""
    request = admin_pb2.ExplainRequest(request_id=request_id)
    with _admin(address, credential) as stub:
        answer: admin_pb2.ExplainedRequest = stub.Explain(request, timeout=timeout_s)
    return answer


def apply(
    path: str | Path,
    address: str = "",
    dry_run: bool = False,
    wait: bool = True,
    timeout_s: float = 600.0,
    generation: int = 0,
    progress: Progress = lambda line: None,
    credential: Path | None = None,
) -> admin_pb2.ApplyResponse:
    """Has the cluster become what the file says; its own controller.grpc where no address is.

    `generation` is that of the spec that is to be changed; 0 takes the present one. `progress`
    hears what is waited for. Raises ConfigError naming file, line and field; Overtaken when the
    spec was or is changed by another; Unavailable when no controller answers.
    """
    spec = ClusterSpec.load(path)
    request = admin_pb2.ApplyRequest(
        yaml=spec.to_yaml(), file=str(path), dry_run=True, wait=wait, generation=generation
    )
    try:
        with _admin(address or spec.controller.grpc, credential) as stub:
            planned: admin_pb2.ApplyResponse = stub.Apply(request, timeout=ANSWER_S)
            if dry_run:
                return planned
            request.dry_run = False
            request.generation = generation or planned.generation
            return _carry_out(stub.Apply, request, timeout_s, progress)
    except ConfigError as error:
        text = Path(path).read_text(encoding="utf-8")
        raise error.at(locate(text, str(path), error.field)) from None


def scale(
    pool: str,
    replicas: int,
    address: str = CONTROLLER_ADDRESS,
    wait: bool = True,
    timeout_s: float = 600.0,
    progress: Progress = lambda line: None,
    credential: Path | None = None,
) -> admin_pb2.ApplyResponse:
    """Raises ConfigError for an unknown pool or a number that is not allowed, and as `apply`."""
    request = admin_pb2.ScaleRequest(pool=pool, replicas=replicas, wait=wait)
    with _admin(address, credential) as stub:
        return _carry_out(stub.Scale, request, timeout_s, progress)


def _carry_out(
    ask: Callable[..., admin_pb2.ApplyResponse],
    request: admin_pb2.ApplyRequest | admin_pb2.ScaleRequest,
    timeout_s: float,
    progress: Progress,
) -> admin_pb2.ApplyResponse:
    """Asks again, which changes nothing more, until the cluster is as asked or can't become so."""
    deadline, actions, told = time.monotonic() + timeout_s, None, set[str]()
    while True:
        remaining = max(0.01, deadline - time.monotonic())
        request.timeout_s = min(PROGRESS_S, remaining)
        answer = ask(request, timeout=request.timeout_s + ANSWER_S)
        actions = list(answer.actions) if actions is None else actions
        if answer.converged or answer.hopeless or not request.wait or remaining <= PROGRESS_S:
            answer.actions[:] = actions
            return answer
        request.generation = answer.generation
        for line in answer.waiting_for:
            if line not in told:
                progress(line)
        told = set(answer.waiting_for)


def down(
    address: str = CONTROLLER_ADDRESS, drain_s: float = 10.0, credential: Path | None = None
) -> None:
    """Ends the cluster; its gateways may finish their requests for `drain_s`."""
    with _admin(address, credential) as stub:
        stub.Down(admin_pb2.DownRequest(drain_s=drain_s), timeout=drain_s + 60)


@contextlib.contextmanager
def _admin(address: str, credential: Path | None) -> Iterator[admin_pb2_grpc.AdminStub]:
    try:
        proof = credentials.find(address, credential)
    except ConfigError:
        _check_listens(address)
        raise
    longest = ("grpc.max_receive_message_length", MAX_STATUS_BYTES)
    with open_blocking_channel(address, proof, CONTROLLER, longest) as channel:
        try:
            yield admin_pb2_grpc.AdminStub(channel)
        except grpc.RpcError as error:
            raise _translated(address, error) from None


def _check_listens(address: str) -> None:
    """Raises Unavailable where nobody does: then it is not the credential that is missing."""
    try:
        socket.create_connection(split_address(address), timeout=2).close()
    except (OSError, ValueError) as error:
        raise Unavailable(f"no controller answers at {address} ({error})") from None


def _translated(address: str, error: grpc.RpcError) -> CrossdockError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        why = f"no controller answers at {address} whom this credential knows"
        return Unavailable(f"{why} ({details})")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        field, _, message = details.partition(": ")
        return ConfigError(field, message)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(details)
    if code is grpc.StatusCode.ABORTED:
        return Overtaken(details)
    return CrossdockError(f"{code.name}: {details}")
