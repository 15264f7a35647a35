"""NCCL through cupy: the one file that calls it.

- NCCL_COMM_BLOCKING=0 is set for the whole process before NCCL is first used: then no call waits
  for another rank, and each can be aborted. cupy has no other way to say so.
- What is under way is a status that cupy (14.2) does not know: a KeyError, which `_carried_on`
  understands. A communicator is told to begin before it is constructed in full, since cupy would
  destroy one whose constructor raised.
- A group that is under way may not have reached its stream. So the event that says when it ended
  is recorded only after NCCL says that it has.
- Two ranks of one communicator cannot share a GPU: NCCL refuses that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import cupy
from cupy.cuda import nccl

from crossdock.kvtransfer.nccl.communicator import Span
from crossdock.kvtransfer.transport import PoolMemory
from crossdock.proto.errors import TransferFailed

_IN_PROGRESS = 7  # ncclInProgress
_OLDEST = 21800  # NCCL 2.18 brought NCCL_COMM_BLOCKING


class CupyCommunicators:
    """See Communicators."""

    def open(self, memory: PoolMemory) -> None:
        """Binds the calling thread to the pool's GPU. Raises TransferFailed: DRAM, old NCCL."""
        if memory.memory_type != "VRAM":
            raise TransferFailed("the nccl transport moves GPU memory; this pool is host memory")
        if not nccl.available:
            raise TransferFailed("cupy finds no NCCL library")
        if nccl.get_version() < _OLDEST:
            raise TransferFailed(f"NCCL {nccl.get_version()} is too old: at least {_OLDEST}")
        os.environ["NCCL_COMM_BLOCKING"] = "0"
        cupy.cuda.Device(memory.device_id).use()  # of this thread, from now on

    def unique_id(self) -> bytes:
        return bytes(nccl.get_unique_id())

    def join(self, unique_id: bytes, rank: int, ranks: int = 2) -> CupyCommunicator:
        """Starts to meet the other rank; it has been met once the communicator is `ready`."""
        return CupyCommunicator(unique_id, rank, ranks)


class CupyCommunicator:
    """See Communicator. Has a stream of its own, so that engine and transfers do not wait for each
    other."""

    def __init__(self, unique_id: bytes, rank: int, ranks: int) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._launching: CupyOperation | None = None  # posted, maybe not on the stream yet
        self._comm = nccl.NcclCommunicator.__new__(nccl.NcclCommunicator)
        _carried_on(lambda: self._comm.__init__(ranks, unique_id, rank, nccl.NcclConfig()))

    def ready(self) -> bool:
        """False while NCCL is still at work on a call. Raises TransferFailed when it broke."""
        if not _carried_on(self._comm.check_async_error):
            return False
        if self._launching is not None:
            self._launching.mark(self._stream)
            self._launching = None
        return True

    def post(
        self, peer: int, *, send: Sequence[Span] = (), recv: Sequence[Span] = ()
    ) -> CupyOperation:
        """Puts the copies on the communicator's stream; spans are (address, bytes) of VRAM."""
        _carried_on(nccl.groupStart)
        try:
            for call, spans in (self._comm.send, send), (self._comm.recv, recv):
                for address, nbytes in spans:
                    _post_span(call, address, nbytes, peer, self._stream.ptr)
        finally:
            _carried_on(nccl.groupEnd)
        self._launching = CupyOperation(self)
        return self._launching

    def abort(self) -> None:
        """Kernels of this communicator that wait for the peer are told to end, and do within
        milliseconds; NCCL gives back its own memory."""
        _carried_on(self._comm.abort)

    def quiet(self) -> bool:
        """Whether the stream is empty, so that nothing touches memory any more."""
        try:
            return bool(self._stream.done)
        except Exception:
            return True  # the device is lost, and with it whatever ran there


class CupyOperation:
    """See Operation."""

    def __init__(self, communicator: CupyCommunicator) -> None:
        self._communicator = communicator
        self._event: Any = None

    def mark(self, stream: Any) -> None:
        """Records where on the stream its kernels end."""
        self._event = cupy.cuda.Event(disable_timing=True)
        self._event.record(stream)

    def done(self) -> bool:
        """Whether the stream has come past its kernels. Raises TransferFailed where CUDA fails."""
        self._communicator.ready()
        try:
            return self._event is not None and bool(self._event.done)
        except Exception as error:
            raise TransferFailed(f"CUDA: {error}") from error


def _post_span(call: Any, address: int, nbytes: int, peer: int, stream: int) -> None:
    _carried_on(lambda: call(address, nbytes, nccl.NCCL_UINT8, peer, stream))


def _carried_on(call: Callable[[], object]) -> bool:
    """Makes the call. False: NCCL goes on with it by itself. Raises TransferFailed."""
    try:
        call()
    except KeyError as error:  # cupy has no name for this status
        if error.args == (_IN_PROGRESS,):
            return False
        raise TransferFailed(f"NCCL: status {error}") from error
    except Exception as error:
        if getattr(error, "status", None) == _IN_PROGRESS:
            return False
        raise TransferFailed(f"NCCL: {error}") from error
    return True
