"""How commands reach a gateway: the options that say where it is and whom to trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

if TYPE_CHECKING:
    from crossdock.client import Client

Target = Annotated[
    str,
    Option(
        "--target",
        "--address",
        envvar="CROSSDOCK_TARGET",
        help="The gateway's gRPC address, host:port.",
    ),
]
Authority = Annotated[
    str,
    Option(
        "--ca",
        envvar="CROSSDOCK_CA",
        help="Speak TLS with the gateway and trust this authority (PEM). With grpcs://host:port as "
        "the target, those that the machine trusts.",
    ),
]
Certificate = Annotated[
    str,
    Option("--cert", help="The client's own certificate and its key (PEM), where asked for."),
]


def connect(target: str, ca: str, cert: str) -> Client:
    """Raises BadParameter for files that cannot be read."""
    from crossdock.client import Client, Tls
    from crossdock.proto.errors import InvalidRequest

    try:
        return Client(target, tls=Tls(ca, cert) if ca or cert else None)
    except InvalidRequest as error:
        raise BadParameter(str(error)) from None
