"""As much of cupy.cuda.nccl as kvtransfer calls: one rank that sends to itself.

Like the real one where NCCL_COMM_BLOCKING is 0, it is under way for a while after every call, says
so with a KeyError, and puts a group on its stream only then.
"""

from __future__ import annotations

import ctypes
import os
import types
from collections.abc import Callable

from fake_cupy import Stream, stream_of

IN_PROGRESS = 7
STEPS = 3  # looks at a communicator until it has caught up


class NcclError(RuntimeError):
    status = 3


class NcclConfig:
    pass


class NcclCommunicator:
    made: list[NcclCommunicator] = []  # noqa: RUF012

    def __init__(self, ndev: int, commId: bytes, rank: int, config: NcclConfig) -> None:
        assert (ndev, rank, type(commId), len(commId)) == (1, 0, bytes, 128)
        assert os.environ["NCCL_COMM_BLOCKING"] == "0"
        self.calls: list[tuple[bool, int, int, int]] = []
        self.launches: list[Callable[[], None]] = []
        self.fault = self.aborted = False
        self.behind = STEPS
        NcclCommunicator.made.append(self)
        raise KeyError(IN_PROGRESS)

    def check_async_error(self) -> None:
        if self.fault or self.aborted:
            raise NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited")
        if self.behind:
            self.behind -= 1
            raise KeyError(IN_PROGRESS)
        while self.launches:
            self.launches.pop(0)()

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._queue(True, sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._queue(False, recvbuf, count, datatype, peer, stream)

    def abort(self) -> None:
        self.aborted = True
        self.launches.clear()

    def _queue(self, *call: int) -> None:
        assert nccl.depth == 1, "outside a group it would wait for its other half"
        assert not self.behind, "NCCL refuses a communicator that is under way"
        assert call[3:5] == (nccl.NCCL_UINT8, 0)
        nccl.grouped.append((self, call))


def _launch(calls: list[tuple[int, ...]]) -> None:
    sends = [call for call in calls if call[0]]
    recvs = [call for call in calls if not call[0]]
    for (_, source, count, *_, stream), (_, target, room, *_) in zip(sends, recvs, strict=True):
        assert count == room
        stream_of(stream).work.append(lambda s=source, t=target, n=count: ctypes.memmove(t, s, n))


def groupStart() -> None:
    nccl.depth += 1


def groupEnd() -> None:
    nccl.depth -= 1
    grouped, nccl.grouped = nccl.grouped, []
    for communicator in {each for each, _ in grouped}:
        calls = [call for each, call in grouped if each is communicator]
        communicator.launches.append(lambda calls=calls: _launch(calls))
        communicator.behind = STEPS
    if grouped:
        raise KeyError(IN_PROGRESS)


class Event:
    """Done when the stream has run what was on it when the event was recorded."""

    def __init__(self, *, disable_timing: bool) -> None:
        self._marked = False

    def record(self, stream: Stream) -> None:
        stream.work.append(self._mark)

    def _mark(self) -> None:
        self._marked = True

    @property
    def done(self) -> bool:
        for stream in Stream.made:
            if stream.work:
                stream.work.pop(0)()
        return self._marked


nccl = types.SimpleNamespace(
    available=True,
    depth=0,
    grouped=[],
    get_version=lambda: 22707,
    get_unique_id=lambda: bytes(range(128)),
    groupStart=groupStart,
    groupEnd=groupEnd,
    NcclCommunicator=NcclCommunicator,
    NcclConfig=NcclConfig,
    NcclError=NcclError,
    NCCL_UINT8=1,
)
