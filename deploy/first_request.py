"""The first request of all, through a gateway's own door, as a client would send it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

import grpc
from cryptography import x509

from crossdock.proto.channels import internal
from crossdock.proto.errors import Unavailable
from crossdock.proto.identity import Identity
from crossdock.proto.settings import split_address
from crossdock.proto.v1 import admin_pb2, inference_pb2, inference_pb2_grpc

POLL_S = 0.25
FIRST_TOKENS_S = 60.0  # for the first request of all
HANDSHAKE_S = 10.0


def prove(
    gateway: admin_pb2.GatewayStatus,
    api_key: str,
    operator: Identity | None,
    meanwhile: Callable[[], None],
    model: str = "",
) -> None:
    """Two tokens of this model, or of the first, come out of this gateway: the second is a decode
    worker's, from the KV that it pulled. Raises Unavailable saying why not, and whatever
    `meanwhile` raises.

    operator: who asks, where the door is TLS; None where it is plain.
    """
    prompt = inference_pb2.TokenIds(ids=[0])
    request = inference_pb2.GenerateRequest(token_ids=prompt, model=model)
    request.sampling.MergeFrom(inference_pb2.SamplingParams(max_tokens=2, ignore_eos=True))
    address = reachable(gateway.grpc)
    try:
        channel = _secure(address, operator) if operator else _plain(address)
    except (OSError, ValueError) as error:
        why = f"its certificate could not be had: {error}"
        raise Unavailable(f"{gateway.name} at {gateway.grpc} served no token: {why}") from None
    with channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        answer = stub.GenerateUnary.future(request, timeout=FIRST_TOKENS_S, metadata=metadata)
        while not answer.done():
            meanwhile()
            time.sleep(POLL_S)
        if answer.code() is not grpc.StatusCode.OK:
            why = f"{answer.code().name}: {answer.details()}"
            raise Unavailable(f"{gateway.name} at {gateway.grpc} served no token: {why}")


def _plain(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, internal())


def _secure(address: str, operator: Identity) -> grpc.Channel:
    """Takes whatever certificate the door shows: it is for a name that clients use, and no secret
    is sent, beside a key that is good for nothing but such a request."""
    shown = ssl.get_server_certificate(split_address(address), timeout=HANDSHAKE_S)
    name = _name_in(x509.load_pem_x509_certificate(shown.encode()))
    options = internal(("grpc.ssl_target_name_override", name)) if name else internal()
    proof = (shown.encode(), operator.key, operator.certificate)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*proof), options)


def _name_in(certificate: x509.Certificate) -> str:
    """A name that it is good for; empty where it has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(common[0].value) if common else ""
    dns = [name.replace("*", "gateway", 1) for name in names.get_values_for_type(x509.DNSName)]
    return next(iter([*dns, *map(str, names.get_values_for_type(x509.IPAddress))]), "")


def reachable(address: str) -> str:
    """Where a server that listens at `address` is reached from its own machine."""
    return address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
