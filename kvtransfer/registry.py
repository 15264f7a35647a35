"""Transports by the name that the YAML gives them, and the memory that each can read.

Libraries are imported when their transport is asked for: a worker on `local` needs no nixl.
"""

from __future__ import annotations

from collections.abc import Mapping

from crossdock.kvtransfer.transport import PoolBuffers, PoolMemory, Transport
from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import loopback_host

TRANSPORTS = ("nixl", "nccl", "local")


def create_transport(
    name: str,
    incarnation: bytes,
    memory: PoolMemory,
    *,
    ucx: Mapping[str, str] | None = None,
    cluster_key: bytes = b"",
    host: str = "127.0.0.1",
) -> Transport:
    """A running transport over `memory`, which outlives it.

    ucx: for nixl, e.g. {"TLS": "rc,cuda", "NET_DEVICES": "mlx5_0:1"}: UCX's own names without
    their prefix. host: where peers reach this one; at a loopback address nixl listens nowhere
    else, and nccl always where it says. cluster_key: for nccl, whose peers prove that they know
    it. Raises ConfigError for an unknown name, TransferFailed when the library does not start.
    """
    if name == "nixl":
        from crossdock.kvtransfer.nixl import NixlTransport

        return NixlTransport(incarnation, memory, ucx=ucx or {}, loopback=loopback_host(host))
    if name == "nccl":
        from crossdock.kvtransfer.nccl.transport import NcclTransport

        return NcclTransport(incarnation, memory, key=cluster_key, host=host)
    if name == "local":
        from crossdock.kvtransfer.local import LocalTransport

        return LocalTransport(incarnation, memory)
    raise _unknown(name)


def allocate(name: str, nbytes: int, num_blocks: int) -> PoolBuffers:
    """Zeroed host memory for a KV pool that the transport of that name can read. It is given back
    when neither array is used any more."""
    if name == "local":
        from crossdock.kvtransfer.shared_memory import allocate_segment

        return allocate_segment(nbytes, num_blocks)
    if name in TRANSPORTS:
        from crossdock.kvtransfer.memory import allocate_pages

        return allocate_pages(nbytes, num_blocks)
    raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    return ConfigError("kv.transport", f"{name!r} is not one of {', '.join(TRANSPORTS)}")
