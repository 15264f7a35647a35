"""Transports by the name that the YAML gives them, and the memory that each can read.

Libraries are imported when their transport is asked for: a worker on `local` needs no nixl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.rank_link import RankTransport, serve
from crossdock.kvtransfer.ranked import RankedTransport, rank_incarnation
from crossdock.kvtransfer.transport import Generations, PoolBuffers, PoolMemory, Transport
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
    hosts: Sequence[Callable[..., Connection]] = (),
) -> Transport:
    """A running transport over `memory`, which outlives it. hosts: what run a function in the
    process of each rank after the first, see engine.contract.Host.

    ucx: for nixl, e.g. {"TLS": "rc,cuda", "NET_DEVICES": "mlx5_0:1"}: UCX's own names without
    their prefix. host: where peers reach this one; at a loopback address nixl listens nowhere
    else, and nccl always where it says. cluster_key: for nccl, whose peers prove that they know
    it. Raises ConfigError for an unknown name, TransferFailed when the library does not start.
    """
    create = partial(_create, name, dict(ucx or {}), cluster_key, host)
    if not hosts:
        return create(incarnation, memory)
    others = [
        host_in(partial(serve, partial(create, rank_incarnation(incarnation, rank))))
        for rank, host_in in enumerate(hosts, 1)
    ]
    first = create(incarnation, memory.part)
    return RankedTransport([first, *map(RankTransport, others)])


def _create(
    name: str,
    ucx: Mapping[str, str],
    cluster_key: bytes,
    host: str,
    incarnation: bytes,
    memory: PoolMemory,
) -> Transport:
    if name == "nixl":
        from crossdock.kvtransfer.nixl import NixlTransport

        return NixlTransport(incarnation, memory, ucx=ucx, loopback=loopback_host(host))
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


class Allocator:
    """`allocate` for one transport, which keeps what is to be given back. A copy that is sent to
    another process has allocated nothing yet."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._free: list[Callable[[], None]] = []

    def __call__(self, nbytes: int, num_blocks: int) -> tuple[npt.NDArray[np.uint8], Generations]:
        buffer, generations, free = allocate(self._transport, nbytes, num_blocks)
        self._free.append(free)
        return buffer, generations

    def __reduce__(self) -> tuple[type[Allocator], tuple[str]]:
        return Allocator, (self._transport,)

    def close(self) -> None:
        """Gives back what was allocated here; a second call does nothing."""
        while self._free:
            self._free.pop()()


def _unknown(name: str) -> ConfigError:
    return ConfigError("kv.transport", f"{name!r} is not one of {', '.join(TRANSPORTS)}")
