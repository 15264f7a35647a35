"""The network between simulated workers, and the transport that reads KV over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crossdock.engine.profiles import Profile
from crossdock.kvtransfer.regions import merge_runs
from crossdock.kvtransfer.transport import Handle, TransportStats, check_ids
from crossdock.proto.errors import TransferFailed
from crossdock.proto.memory import PoolMemory
from crossdock.sim.clock import VirtualClock


@dataclass
class Fabric:
    """Every worker has one network interface. What it sends waits for what it sends already, what
    it receives likewise: a transfer takes both ends' interfaces, for latency + bytes / bandwidth.
    """

    clock: VirtualClock
    transports: dict[bytes, SimTransport] = field(default_factory=dict)  # by incarnation

    def done_at(self, source: SimTransport, target: SimTransport, nbytes: int) -> float:
        """When so many bytes, asked for now, have arrived; the interfaces are taken until then."""
        rates = (source.profile.link_bytes_per_s, target.profile.link_bytes_per_s)
        seconds = max(nbytes / rate if rate else 0.0 for rate in rates)
        start = max(self.clock.now, source.sends_until, target.receives_until)
        source.sends_until = target.receives_until = end = start + seconds
        return end + target.profile.link_latency_s


class SimTransport:
    """See kvtransfer.transport.Transport. Blocks are counted, timed and fenced; no byte moves."""

    def __init__(
        self, fabric: Fabric, incarnation: bytes, memory: PoolMemory, profile: Profile
    ) -> None:
        self.memory, self.profile = memory, profile
        self.stats = TransportStats()
        self.sends_until = self.receives_until = 0.0
        self._fabric, self._incarnation = fabric, incarnation
        self._peers: set[bytes] = set()
        self._released: list[bytes] = []
        self._wakeup: Callable[[], None] = lambda: None
        fabric.transports[incarnation] = self

    def info(self) -> bytes:
        return self._incarnation

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """Raises TransferFailed for a peer that is gone."""
        if incarnation not in self._fabric.transports:
            raise TransferFailed(f"peer {incarnation.hex()} cannot be reached")
        self._peers.add(incarnation)

    def remove_peer(self, incarnation: bytes) -> None:
        self._peers.discard(incarnation)

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        return self.profile.link_latency_s

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        handle, peer = Handle(), self._peer(incarnation)
        if peer is None:
            self._settle(handle, "peer is gone")
            return handle
        check_ids(remote_ids, peer.memory.num_blocks, "remote")
        check_ids(local_ids, self.memory.num_blocks, "local")
        nbytes = len(remote_ids) * self.memory.block_bytes
        self.stats.reads += 1
        self.stats.blocks += len(remote_ids)
        self.stats.descriptors += len(merge_runs(remote_ids, local_ids))
        self.stats.bytes += nbytes
        clock = self._fabric.clock
        clock.call_at(self._fabric.done_at(peer, self, nbytes), self._settle, handle)
        return handle

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        handle, remote = Handle(), np.asarray(remote_ids, dtype=np.int64)

        def act() -> None:
            peer = self._peer(incarnation)
            if peer is None:
                self._settle(handle, "peer is gone")
                return
            handle.generations = peer.memory.generations[remote].copy()
            self.stats.fences += 1
            if notify:
                peer.receive(notify)
            self._settle(handle)

        self._fabric.clock.call_later(self.profile.link_latency_s, act)
        return handle

    def notifications(self) -> list[bytes]:
        released, self._released = self._released, []
        return released

    def expect_notifications(self, expected: bool) -> None:
        pass

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        self._wakeup = callback

    def receive(self, ticket_id: bytes) -> None:
        """A peer has read a ticket's blocks."""
        self.stats.notifications += 1
        self._released.append(ticket_id)
        self._wakeup()

    def close(self) -> None:
        """Others' reads of it fail from now on."""
        self._fabric.transports.pop(self._incarnation, None)

    def _peer(self, incarnation: bytes) -> SimTransport | None:
        return self._fabric.transports.get(incarnation) if incarnation in self._peers else None

    def _settle(self, handle: Handle, error: str | None = None) -> None:
        if error is not None:
            self.stats.failures += 1
            handle.fail(error)
        elif handle.finish(handle.generations):
            return  # another read followed, with whose end both are told
        self._wakeup()
