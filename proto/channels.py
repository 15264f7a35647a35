"""gRPC channels between the processes of one cluster."""

from __future__ import annotations


def internal(*options: tuple[str, int]) -> list[tuple[str, int]]:
    """`options` of a channel inside the cluster: it never goes through http(s)_proxy."""
    return [("grpc.enable_http_proxy", 0), *options]


def is_loopback(address: str) -> bool:
    """Whether host:port is of this machine's loopback."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
