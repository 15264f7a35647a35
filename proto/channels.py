"""gRPC channels and ports between the processes of one cluster: mutual TLS, or loopback alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

import grpc

from crossdock.proto.errors import ConfigError
from crossdock.proto.identity import Credentials, Identity, host_name
from crossdock.proto.settings import is_loopback

Option = tuple[str, int | str]
# Of a server of long-lived streams: room enough from the start, instead of a ping beside what comes
# to find out how much would be.
STREAMS: tuple[Option, ...] = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 22))
SHUTDOWN_S = 1.0  # for a peer to take leave of TLS
RETIRE_S = 10.0  # for calls under way on a channel that another replaces


def internal(*options: Option) -> list[Option]:
    """`options` of a channel inside the cluster: it never goes through http(s)_proxy."""
    return [("grpc.enable_http_proxy", 0), *options]


def open_channel(
    address: str, credentials: Credentials | None, whom: str, *options: Option
) -> grpc.aio.Channel:
    """A channel to the process at `address` that is `whom`: an incarnation, or a role; nobody else
    gets a byte. Without credentials it is plain, and finds no server outside the loopback."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, internal(*options))
    return grpc.aio.secure_channel(address, credentials.client(), _to(whom, options))


async def connect(
    stream: asyncio.BaseProtocol, address: str, credentials: Credentials | None, whom: str
) -> None:
    """Gives `stream` a connection to the process at `address` that is `whom`, as open_channel.
    Raises OSError."""
    host, _, port = address.rpartition(":")
    secured: dict[str, Any] = {}
    if credentials is not None:
        secured["ssl"] = credentials.client_tls()
        secured["server_hostname"] = host_name(whom)
        secured["ssl_shutdown_timeout"] = SHUTDOWN_S
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: stream, host.strip("[]"), int(port), **secured)


def open_blocking_channel(
    address: str, credentials: Credentials | None, whom: str, *options: Option
) -> grpc.Channel:
    """The same for callers without an event loop."""
    if credentials is None:
        return grpc.insecure_channel(address, internal(*options))
    return grpc.secure_channel(address, credentials.client(), _to(whom, options))


def _to(whom: str, options: Iterable[Option]) -> list[Option]:
    return internal(*options, ("grpc.ssl_target_name_override", host_name(whom)))


def listen(server: Any, address: str, credentials: Credentials | None, field: str) -> str:
    """Has a grpc.aio server listen; returns host:port with the port that it got. Without
    credentials on the loopback alone. Raises ConfigError naming the field."""
    if credentials is None and not is_loopback(address):
        raise ConfigError(field, f"{address}: without a certificate, only the loopback is served")
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials.server())
    except RuntimeError as error:
        raise ConfigError(field, f"{address} is in use or not of this host") from error
    return f"{address.rpartition(':')[0]}:{port}"


class _Made(NamedTuple):
    channel: grpc.aio.Channel
    whom: str
    identity: Identity | None


class Channels:
    """Channels by address, made anew once this process has another certificate, or another
    incarnation is meant. On the event loop."""

    def __init__(self, credentials: Credentials | None, *options: Option) -> None:
        self._credentials = credentials
        self._options = options
        self._made: dict[str, _Made] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str, whom: str) -> grpc.aio.Channel:
        """To `whom` at `address`, as open_channel."""
        identity = self._credentials.identity if self._credentials else None
        made = self._made.get(address)
        if made is not None and (made.whom, made.identity) == (whom, identity):
            return made.channel
        if made is not None:
            self._retire(made.channel)
        channel = open_channel(address, self._credentials, whom, *self._options)
        self._made[address] = _Made(channel, whom, identity)
        return channel

    def retire(self, addresses: Iterable[str]) -> None:
        """Closes the channels to all but `addresses` once the calls that they have are over."""
        for address in self._made.keys() - set(addresses):
            self._retire(self._made.pop(address).channel)

    async def keep(self, addresses: Iterable[str]) -> None:
        """Closes the channels to all others, and what calls they have."""
        for address in self._made.keys() - set(addresses):
            await self._made.pop(address).channel.close()

    def _retire(self, channel: grpc.aio.Channel) -> None:
        """Its calls may end."""
        closing = asyncio.get_running_loop().create_task(channel.close(grace=RETIRE_S))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
