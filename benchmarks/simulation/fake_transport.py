"""A transport in memory, for tests: no thread, no time of its own, faults by script.

Transports that share a FakeNetwork are each other's possible peers. A read happens at once, or,
while the network holds, when the test delivers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crossdock.kvtransfer.regions import match_regions, merge_runs
from crossdock.kvtransfer.transport import (
    Handle,
    PoolMemory,
    TransportStats,
    check_ids,
)
from crossdock.proto.errors import TransferFailed


@dataclass
class _Message:
    sender: FakeTransport
    receiver: bytes
    handle: Handle
    act: Callable[[FakeTransport], None]  # with the receiver, when it is delivered


@dataclass
class FakeNetwork:
    """The wire, and the test's hand on it."""

    holding: bool = False
    transports: dict[bytes, FakeTransport] = field(default_factory=dict)
    _queue: list[_Message] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _drops: int = 0

    def hold(self) -> None:
        """From now on nothing moves until `deliver`."""
        self.holding = True

    def deliver(self, count: int | None = None) -> int:
        """Lets the `count` oldest messages through (all, and holds no more, when None)."""
        if count is None:
            self.holding = False
        due = self._queue[:count]
        del self._queue[: len(due)]
        for message in due:
            self._carry_out(message)
        return len(due)

    def pending(self) -> int:
        """Messages held back and not carried out yet."""
        return len(self._queue)

    def fail_next_read(self, reason: str = "scripted failure") -> None:
        """The next message delivered, of blocks or of generations, fails."""
        self._failures.append(reason)

    def drop_next_notification(self) -> None:
        """The next notification is lost although its sender sees success."""
        self._drops += 1

    def kill(self, incarnation: bytes) -> None:
        """The process is gone: what it had under way and what others had with it fails."""
        dead = self.transports.pop(incarnation)
        dead.alive = False
        self._queue, queued = [], self._queue
        for message in queued:
            if message.receiver == incarnation or message.sender is dead:
                message.sender.settle(message.handle, "peer is gone")
            else:
                self._queue.append(message)

    def send(self, message: _Message) -> None:
        """Carries a message out now, or queues it while the network is holding."""
        if self.holding:
            self._queue.append(message)
        else:
            self._carry_out(message)

    def take_drop(self) -> bool:
        """Whether the next notification is to be lost; uses up one of those asked for."""
        dropped = self._drops > 0
        self._drops -= dropped
        return dropped

    def _carry_out(self, message: _Message) -> None:
        receiver = self.transports.get(message.receiver)
        if receiver is None or not receiver.alive:
            message.sender.settle(message.handle, "peer is gone")
        elif self._failures:
            message.sender.settle(message.handle, self._failures.pop(0))
        else:
            message.act(receiver)


class FakeTransport:
    """See transport.Transport. A restarted process is a new one under a new incarnation."""

    def __init__(self, network: FakeNetwork, incarnation: bytes, memory: PoolMemory) -> None:
        self._network = network
        self._incarnation = incarnation
        self._peers: dict[bytes, list[bool]] = {}  # see match_regions
        self._released: list[bytes] = []
        self._wakeup: Callable[[], None] = lambda: None
        self.memory = memory
        self.alive = True
        self.stats = TransportStats()
        network.transports[incarnation] = self

    def info(self) -> bytes:
        return self._incarnation

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """Raises TransferFailed for a peer that is gone or whose blocks have another size."""
        peer = self._network.transports.get(incarnation)
        if info != incarnation or peer is None:
            raise TransferFailed(f"peer {incarnation.hex()} cannot be reached")
        told = peer.memory.block_bytes
        if block_bytes != told:
            raise TransferFailed(f"peer {incarnation.hex()} has blocks of {told} bytes")
        theirs, mine = peer.memory.regions, self.memory.regions
        self._peers[incarnation] = match_regions(incarnation.hex(), theirs, mine)

    def remove_peer(self, incarnation: bytes) -> None:
        self._peers.pop(incarnation, None)

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        peer = self._network.transports.get(incarnation)
        if incarnation not in self._peers or peer is None:
            raise TransferFailed(f"peer {incarnation.hex()} cannot be reached")
        return 0.0

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        remote, local = list(remote_ids), list(local_ids)
        handle, packed = Handle(), self._peers.get(incarnation, ())

        def act(peer: FakeTransport) -> None:
            try:
                check_ids(remote, peer.memory.num_blocks, "remote")
                check_ids(local, self.memory.num_blocks, "local")
            except ValueError as error:
                self.settle(handle, str(error))
                return
            for mine, theirs in zip(self.memory.views, peer.memory.views, strict=True):
                mine[local] = theirs[remote]
            self.stats.reads += 1
            self.stats.blocks += len(remote)
            self.stats.descriptors += len(merge_runs(remote, local, packed))
            self.stats.bytes += len(remote) * self.memory.block_bytes
            self.settle(handle)

        return self._post(incarnation, handle, act)

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        remote = list(remote_ids)
        handle = Handle()

        def act(peer: FakeTransport) -> None:
            try:
                check_ids(remote, peer.memory.num_blocks, "remote")
            except ValueError as error:
                self.settle(handle, str(error))
                return
            handle.generations = peer.memory.generations[np.array(remote, dtype=np.int64)].copy()
            self.stats.fences += 1
            if notify and not self._network.take_drop():
                peer.receive(notify)
            self.settle(handle)

        return self._post(incarnation, handle, act)

    def notifications(self) -> list[bytes]:
        released, self._released = self._released, []
        return released

    def expect_notifications(self, expected: bool) -> None:
        pass

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        self._wakeup = callback

    def close(self) -> None:
        """Kills this incarnation: what others read of it fails from now on."""
        if self.alive:
            self._network.kill(self._incarnation)

    def receive(self, ticket_id: bytes) -> None:
        self.stats.notifications += 1
        self._released.append(ticket_id)
        self._wakeup()

    def settle(self, handle: Handle, error: str | None = None) -> None:
        """Turns the handle terminal; as sparing with wake-ups as the real ones."""
        followed = False
        if error is None:
            followed = handle.finish(handle.generations)
        else:
            self.stats.failures += 1
            handle.fail(error)
        if not followed:
            self._wakeup()

    def _post(
        self, incarnation: bytes, handle: Handle, act: Callable[[FakeTransport], None]
    ) -> Handle:
        if not self.alive or incarnation not in self._peers:
            self.settle(handle, f"peer {incarnation.hex()} is unknown")
        else:
            self._network.send(_Message(self, incarnation, handle, act))
        return handle
