"""KV transfer over NIXL and UCX: RDMA, NVLink, TCP or shared memory, whatever joins the pair.

The one file that calls nixl. What was measured of it rather than read:

- Its Python agent sets the progress thread's delay to 0, which makes that thread spin on a whole
  core. With some milliseconds it sleeps on UCX's event descriptor instead: no CPU when idle, and
  a fence of 0.05 to 0.3 ms. Without a progress thread a fence takes as long as the peer's next
  look at its notifications, since the peer has to move its own end along.
- Releasing a transfer under way, or removing its agent, stops nothing: over TCP the peer's bytes
  arrived in the local blocks after both. So a transfer is kept until UCX says that it ended.
- A connection that had an error stays broken; only a new one tells when the link is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nixl._api as api
import numpy as np

from crossdock.kvtransfer.memory import Scratch, spans_of
from crossdock.kvtransfer.nixl_info import (
    PoolInfo,
    descriptors,
    pack_info,
    parse_info,
    stretches,
)
from crossdock.kvtransfer.regions import RegionTable, Runs
from crossdock.kvtransfer.threaded import Peer, ThreadedTransport, polling_pause, reason_of
from crossdock.kvtransfer.transport import Handle, PoolMemory
from crossdock.kvtransfer.ucx import environment
from crossdock.proto.errors import TransferFailed

log = logging.getLogger(__name__)

_PROGRESS_DELAY_US = 10_000  # how long NIXL's thread sleeps at most between two events
_EXPECTING_POLL_S = 0.002
_IDLE_POLL_S = 0.25
_SCRATCH_ENTRIES = 65_536  # generations that fences may have under way at once: 512 KiB
_GAP = 128  # generations read for one that is wanted, at most: descriptors cost more
_RETRY_S = (0.25, 8.0)  # first and longest pause between two tries to connect to a lost peer

_abandoned: list[object] = []  # agents closed with transfers under way: never freed
_making_agent = threading.Lock()  # holds while settings of the whole process are changed


@dataclass(eq=False)
class _Peer(Peer):
    memory: PoolInfo
    table: RegionTable
    connected: bool = False
    broken: str | None = None  # why it is lost, until a probe over a new connection came back
    in_flight: int = 0
    probe: Handle | None = None  # the read over a new connection that tells whether it is back
    retry_at: float = 0.0
    pause_s: float = _RETRY_S[0]


@dataclass
class _Transfer:
    """One posted NIXL request. Owns its scratch entries until it is terminal."""

    handle: Handle
    peer: _Peer
    request: Any
    done: Callable[[], None]
    scratch: slice | None = None


class NixlTransport(ThreadedTransport[_Peer]):
    """See transport.Transport. The agent's name is the incarnation in hexadecimal.

    `loopback`: all peers are on this host, and nobody else can connect.
    """

    def __init__(
        self,
        incarnation: bytes,
        memory: PoolMemory,
        *,
        ucx: Mapping[str, str] | None = None,
        loopback: bool = False,
    ) -> None:
        super().__init__(f"nixl-{incarnation.hex()[:8]}")
        self._incarnation = incarnation
        self._memory, self._table = memory, RegionTable(memory.regions)
        self._ucx = dict(ucx or {})
        self._loopback = loopback
        self._active: list[_Transfer] = []
        self._waiting: deque[tuple[Handle, Callable[[], bool]]] = deque()  # for scratch entries
        self._scratch = Scratch(max(_SCRATCH_ENTRIES, memory.num_blocks))
        self._busy_since = 0.0
        self._heal_at = 0.0
        self._agent: Any = None
        self._registered: list[Any] = []
        self._info = b""
        self._start()

    def info(self) -> bytes:
        """The agent's metadata behind incarnation, addresses and sizes of the registered pool."""
        return self._info

    # On the transport's thread.

    def _open(self) -> None:
        logging.getLogger("nixl").setLevel(logging.WARNING)
        memory = self._memory
        with _making_agent, environment(self._ucx, self._loopback), _sleeping_progress_thread():
            config = api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
            self._agent = api.nixl_agent(self._incarnation.hex(), config)
        if "UCX" not in self._agent.backends:
            raise TransferFailed("NIXL has no UCX plugin here")
        pool = [(*stretch, memory.device_id, "") for stretch in stretches(memory)]
        counters = [
            (array.ctypes.data, array.nbytes, 0, "")
            for array in (memory.generations, self._scratch.entries)
        ]
        self._registered = [
            self._agent.register_memory(pool, memory.memory_type),
            self._agent.register_memory(counters, "DRAM"),
        ]
        self._info = pack_info(memory, self._incarnation, self._agent.get_agent_metadata())

    def _described(self, incarnation: bytes, info: bytes) -> _Peer:
        memory = parse_info(info, incarnation)
        table = RegionTable(memory.regions)
        return _Peer(incarnation, memory.num_blocks, memory.regions, memory, table)

    def _add(self, described: _Peer) -> None:
        peer = self._peers.get(described.incarnation)
        if peer is None or peer.memory != described.memory:
            if peer is not None and peer.in_flight:
                raise TransferFailed(f"peer {peer.name} changed while it was being read")
            if peer is not None:
                self._disconnect(peer)
            peer = described
        peer.removed = False
        if not peer.connected:
            self._connect(peer)
            peer.broken = None
        self._peers[peer.incarnation] = peer

    def _connect(self, peer: _Peer) -> None:
        try:
            name = self._agent.add_remote_agent(peer.memory.metadata)
        except Exception as error:
            raise TransferFailed(
                f"peer {peer.name} cannot be reached: {reason_of(error)}"
            ) from None
        named = name.decode() if isinstance(name, bytes) else str(name)
        if named != peer.name:
            raise TransferFailed(f"peer {peer.name} sent the metadata of {named}")
        peer.connected = True

    def _disconnect(self, peer: _Peer) -> None:
        if peer.connected:
            peer.connected = False
            try:
                self._agent.remove_remote_agent(peer.name)
            except Exception as error:
                log.warning("removing peer %s: %s", peer.name, reason_of(error))

    def _break(self, peer: _Peer, reason: str) -> None:
        """The library reported an error: connect anew, once nothing is under way, not at once."""
        if peer.broken is None:
            peer.broken = reason
            self._retry_later(peer)

    def _retry_later(self, peer: _Peer) -> None:
        peer.retry_at = time.monotonic() + peer.pause_s
        peer.pause_s = min(2 * peer.pause_s, _RETRY_S[1])

    def _heal(self) -> None:
        """Connects to lost peers again; each is as before once its probe came back."""
        now = time.monotonic()
        if now < self._heal_at:
            return
        self._heal_at = now + _RETRY_S[0]
        lost = [p for p in self._peers.values() if p.broken is not None and not p.removed]
        for peer in [peer for peer in lost if not peer.in_flight and peer.retry_at <= now]:
            self._retry_later(peer)
            self._disconnect(peer)
            try:
                self._connect(peer)
                peer.probe = Handle()
                self._try_generations(peer.probe, peer, [0], b"")
            except Exception as error:
                log.info("peer %s stays lost: %s", peer.name, reason_of(error))

    def _settle_peer(self, peer: _Peer) -> None:
        """Drops what is broken or removed as soon as no transfer holds it."""
        if peer.in_flight == 0 and (peer.broken is not None or peer.removed):
            self._disconnect(peer)
            if peer.removed:
                self._peers.pop(peer.incarnation, None)

    def _check_peer(self, peer: _Peer) -> None:
        if peer.broken is not None:
            raise TransferFailed(f"peer {peer.name} is lost: {peer.broken}")

    def _read(self, handle: Handle, peer: _Peer, runs: Runs) -> None:
        local = self._table.spans(runs.region, runs.local, runs.length)
        remote = peer.table.spans(runs.region, runs.remote, runs.length)
        mine, theirs = self._memory, peer.memory
        self._post(
            _Transfer(handle, peer, None, lambda: self._end_read(handle, runs)),
            self._agent.get_xfer_descs(descriptors(*local, mine.device_id), mine.memory_type),
            self._agent.get_xfer_descs(descriptors(*remote, theirs.device_id), theirs.memory_type),
            b"",
        )

    def _fence(self, handle: Handle, peer: _Peer, remote_ids: Sequence[int], notify: bytes) -> None:
        if len(remote_ids) == 0:
            self._notify(peer, notify)
            self._end_fence(handle, np.empty(0, dtype=np.int64))
            return
        if len(remote_ids) > len(self._scratch.entries):
            raise TransferFailed(f"a fence of {len(remote_ids)} blocks is too long")
        ids = list(remote_ids)
        if self._waiting or not self._try_generations(handle, peer, ids, notify):
            self._waiting.append((handle, lambda: self._try_generations(handle, peer, ids, notify)))

    def _try_generations(
        self, handle: Handle, peer: _Peer, remote_ids: list[int], notify: bytes
    ) -> bool:
        """False: no scratch entries are free now."""
        spans = spans_of(remote_ids, _GAP)
        if spans.length.sum() > len(self._scratch.entries):
            spans = spans_of(remote_ids, 1)
        scratch = self._scratch.take(int(spans.length.sum()))
        if scratch is None:
            return False
        entries, nbytes = self._scratch.entries, 8 * spans.length
        mine = entries.ctypes.data + 8 * (scratch.start + spans.offset)
        local = descriptors(mine, nbytes, 0)
        remote = descriptors(peer.memory.generations_ptr + 8 * spans.first, nbytes, 0)

        def done() -> None:
            self._end_fence(handle, entries[scratch.start + spans.places])

        self._post(
            _Transfer(handle, peer, None, done, scratch),
            self._agent.get_xfer_descs(local, "DRAM"),
            self._agent.get_xfer_descs(remote, "DRAM"),
            notify,
        )
        return True

    def _notify(self, peer: _Peer, message: bytes) -> None:
        if message:
            try:
                self._agent.send_notif(peer.name, message)
            except Exception as error:
                self._break(peer, reason_of(error))
                self._settle_peer(peer)
                raise

    def _post(self, transfer: _Transfer, local: Any, remote: Any, notify: bytes) -> None:
        peer = transfer.peer
        peer.in_flight += 1
        try:
            transfer.request = self._agent.initialize_xfer("READ", local, remote, peer.name, notify)
            state = self._agent.transfer(transfer.request)
        except Exception as error:
            self._end(transfer, reason_of(error))
            return
        if state == "PROC":
            self._active.append(transfer)
            self._busy_since = time.perf_counter()
        else:
            self._end(transfer, None if state == "DONE" else "NIXL refused it")

    def _end(self, transfer: _Transfer, error: str | None) -> None:
        """The one way out of a transfer, once NIXL has nothing under way for it."""
        peer = transfer.peer
        peer.in_flight -= 1
        if error is None:
            if transfer.handle is peer.probe:
                log.warning("peer %s is back after: %s", peer.name, peer.broken)
                peer.broken = None
            peer.pause_s = _RETRY_S[0]
            transfer.done()
        else:
            self._break(peer, error)
            self._fail(transfer.handle, error)
        if transfer.scratch is not None:
            self._scratch.give_back(transfer.scratch)
        if transfer.request is not None:
            try:
                self._agent.release_xfer_handle(transfer.request)
            except Exception as problem:
                log.warning("releasing a transfer with %s: %s", peer.name, reason_of(problem))
        self._settle_peer(peer)

    def _progress(self) -> float | None:
        self._heal()
        if self._active:
            self._active = [transfer for transfer in self._active if not self._ended(transfer)]
        while self._waiting:
            handle, attempt = self._waiting[0]
            try:
                if not attempt():
                    break
            except Exception as error:
                self._fail(handle, reason_of(error))
            self._waiting.popleft()
        for messages in self._agent.get_new_notifs().values():
            for message in messages:
                self._notified(bytes(message))
        if self._active:
            return polling_pause(time.perf_counter() - self._busy_since)
        return _EXPECTING_POLL_S if self._expecting else _IDLE_POLL_S

    def _ended(self, transfer: _Transfer) -> bool:
        try:
            state = self._agent.check_xfer_state(transfer.request)
        except Exception as error:
            self._end(transfer, reason_of(error))
            return True
        if state == "PROC":
            return False
        self._end(transfer, None if state == "DONE" else "NIXL reported an error")
        return True

    def _in_flight(self) -> int:
        return len(self._active)

    def _shut(self) -> None:
        for handle, _ in self._waiting:
            self._fail(handle, "transport is closed")
        if self._active:
            log.error("%d transfers never ended; their memory stays mapped", len(self._active))
            _abandoned.append((self._agent, self._memory, self._scratch, self._active))
            for transfer in self._active:
                self._fail(transfer.handle, "transport is closed")
            return
        for peer in self._peers.values():
            self._disconnect(peer)
        for registration in self._registered:
            self._agent.deregister_memory(registration)
        self._agent = None


@contextmanager
def _sleeping_progress_thread() -> Iterator[None]:
    """While inside, agents are made with a progress thread that sleeps (see the top)."""
    original = api.nixlBind.nixlAgentConfig

    class Config(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, _PROGRESS_DELAY_US if name == "pthrDelay" else value)

    api.nixlBind.nixlAgentConfig = Config
    try:
        yield
    finally:
        api.nixlBind.nixlAgentConfig = original
