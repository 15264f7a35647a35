"""Tries every port of a running local cluster without a credential, and prints what answered.

    python tools/ports.py PID_OF_CROSSDOCK_UP [ADDRESS_OF_A_GATEWAYS_DOOR…]

Run it as the cluster's user or root, on its host: only they see which process has which port. It
asks what a stranger would, and changes nothing: calls that look, with empty requests. Exit 1 where
anything but health, metrics and a gateway's own doors answers anything but a refusal.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from crossdock.deploy import processes
from crossdock.deploy.listening import Listening, listening

TIMEOUT_S = 5.0
CALLS = (
    "grpc.health.v1.Health/Check",
    "crossdock.v1.Admin/GetClusterStatus",
    "crossdock.v1.Worker/Describe",
    "crossdock.v1.Worker/GetStatus",
    "crossdock.v1.Worker/Probe",
    "crossdock.v1.Inference/ListModels",
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.NodeInfoGcsService/GetClusterId",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.InternalKVGcsService/GetInternalConfig",
    "ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus",
    "ray.rpc.NodeManagerService/GetSystemConfig",
    "ray.rpc.NodeManagerService/GetWorkerPIDs",
    "ray.rpc.ObjectManagerService/FreeObjects",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.CoreWorkerService/NumPendingTasks",
)
STREAMS = ("crossdock.v1.Worker/Connect",)
PATHS = ("/", "/health", "/metrics", "/v1/models", "/api/version", "/api/v0/nodes")
# What may answer everybody.
OPEN = {"grpc.health.v1.Health/Check", "GET /health", "GET /metrics"}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)


@dataclass(frozen=True)
class Answer:
    """What one question brought. `given`: an answer, not a refusal, and to a stranger."""

    port: Listening
    asked: str
    said: str
    given: bool


def tried(port: Listening) -> list[Answer]:
    """Everything that a stranger may ask of a port, in order."""
    return [*_calls(port), *_gets(port), _tls(port)]


def unexpected(answers: Sequence[Answer], doors: Sequence[str] = ()) -> list[Answer]:
    """Those that should have been refused; `doors` are addresses of gateways, for tenants. A port
    for metrics alone says the same whatever it is asked."""
    metrics = {(each.port, each.said) for each in answers if each.asked == "GET /metrics"}
    given = [each for each in answers if each.given and each.asked not in OPEN]
    strange = [each for each in given if (each.port, each.said) not in metrics]
    return [each for each in strange if each.port.address not in doors]


def _calls(port: Listening) -> Iterator[Answer]:
    with grpc.insecure_channel(port.address, [("grpc.enable_http_proxy", 0)]) as channel:
        if not _speaks(channel):
            yield Answer(port, "gRPC", "no gRPC without TLS", False)
            return
        for name in CALLS:
            yield _call(port, name, lambda m: channel.unary_unary(m)(b"", timeout=TIMEOUT_S))
        for name in STREAMS:
            yield _call(
                port, name, lambda m: next(channel.stream_stream(m)(iter([b""]), timeout=TIMEOUT_S))
            )


def _speaks(channel: grpc.Channel) -> bool:
    try:
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
    except grpc.FutureTimeoutError:
        return False
    return True


def _call(port: Listening, name: str, ask) -> Answer:  # type: ignore[no-untyped-def]
    try:
        answer = ask(f"/{name}")
    except grpc.RpcError as error:
        code, details = error.code(), (error.details() or "").partition("\n")[0]
        return Answer(port, name, f"{code.name}: {details[:80]}", False)
    except StopIteration:
        return Answer(port, name, "ended without an answer", False)
    return Answer(port, name, f"{len(answer)} bytes", True)


def _gets(port: Listening) -> Iterator[Answer]:
    for path in PATHS:
        asked = f"GET {path}"
        client = http.client.HTTPConnection(port.host, port.port, timeout=TIMEOUT_S)
        try:
            client.request("GET", path)
            reply = client.getresponse()
            size = len(reply.read())
        except (OSError, http.client.HTTPException) as error:
            yield Answer(port, "GET", f"no HTTP ({type(error).__name__})", False)
            return
        finally:
            client.close()
        yield Answer(port, asked, f"{reply.status}, {size} bytes", reply.status < 400)


def _tls(port: Listening) -> Answer:
    """TLS with whichever certificate it has, and none of ours: an answer to HTTP/2's preface that
    is more than the alert that one is missing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((port.host, port.port), TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            secure.sendall(PREFACE)
            said = secure.recv(1)
    except OSError as error:
        return Answer(port, "TLS", f"refused ({getattr(error, 'reason', None) or error})", False)
    return Answer(port, "TLS", "HTTP/2" if said else "closed", bool(said))


def main(root: int, *doors: str) -> int:
    """Prints every port and answer; returns the exit code."""
    pids = {root, *(process.pid for process in processes.descendants(root))}
    ports = listening(pids)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [answer for found in pool.map(tried, ports) for answer in found]
    for port in ports:
        print(f"{port.address}  {port.process} (pid {port.pid})")
        for answer in answers:
            if answer.port == port:
                mark = "answered" if answer.given else "refused "
                print(f"    {mark}  {answer.asked}: {answer.said}")
    wrong = unexpected(answers, doors)
    print(f"{len(ports)} ports, {len(answers)} questions, {len(wrong)} answers to strangers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
