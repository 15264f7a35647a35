"""One contract for communicators: a rank that sends to itself, which NCCL allows on one GPU.

`cupy` is the real one and needs a GPU; `cupy on a fake` is our code on the calls that cupy has,
without a GPU; `fake` is what the nccl transport's tests run on.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import fake_cupy
import fake_cupy_nccl
import numpy as np
import pytest
from fake_nccl import FakeCommunicators

from crossdock.kvtransfer.nccl.communicator import (
    UNIQUE_ID_BYTES,
    Communicator,
    Communicators,
    Operation,
)
from crossdock.kvtransfer.registry import allocate
from crossdock.kvtransfer.transport import PoolMemory
from crossdock.proto.errors import TransferFailed

OURS = "crossdock.kvtransfer.nccl.cupy"
NUM_BLOCKS = 16
BLOCK_BYTES = 4096
WAIT_S = 60.0  # the first communicator of a process loads NCCL's kernels


@dataclass
class Bench:
    communicators: Communicators
    memory: PoolMemory
    read: Callable[[], np.ndarray]  # uint8 [blocks, block_bytes], as it is now

    def span(self, first: int, count: int = 1) -> tuple[int, int]:
        return self.memory.regions[0].address + first * BLOCK_BYTES, count * BLOCK_BYTES

    def alone(self) -> Communicator:
        joined = self.communicators.join(self.communicators.unique_id(), 0, ranks=1)
        until(joined.ready)
        return joined


def until(check: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def content() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)


@pytest.fixture(params=["fake", "cupy on a fake", "cupy"])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    buffer, generations, close = allocate("nccl", NUM_BLOCKS * BLOCK_BYTES, NUM_BLOCKS)
    memory = PoolMemory.block_major(buffer.ctypes.data, NUM_BLOCKS, BLOCK_BYTES, generations)
    (blocks,) = memory.views
    blocks[:] = content()
    vram = replace(memory, memory_type="VRAM")
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "")
    if request.param == "fake":
        bench = Bench(FakeCommunicators(), memory, blocks.copy)
    elif request.param == "cupy":
        cupy = real_cupy()
        on_device = cupy.asarray(content())
        cupy.cuda.Device().synchronize()
        bench = Bench(
            ours(),
            PoolMemory.block_major(
                on_device.data.ptr, NUM_BLOCKS, BLOCK_BYTES, generations, "VRAM"
            ),
            lambda: cupy.asnumpy(on_device),
        )
    else:
        on_a_stand_in(monkeypatch)
        bench = Bench(ours(), vram, blocks.copy)
    bench.communicators.open(bench.memory)
    yield bench
    close()


def real_cupy() -> Any:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    return cupy


def on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cupy_nccl.NcclCommunicator.made.clear()
    nccl = fake_cupy_nccl.nccl
    fake_cupy.install(monkeypatch, nccl=nccl, Event=fake_cupy_nccl.Event)


def ours() -> Communicators:
    """Anew: it keeps the cupy that it was imported with."""
    sys.modules.pop(OURS, None)
    made: Communicators = importlib.import_module(OURS).CupyCommunicators()
    return made


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    sys.modules.pop(OURS, None)


def test_a_group_of_runs_arrives_in_order(bench: Bench) -> None:
    alone = bench.alone()
    sent = [bench.span(0, 2), bench.span(5), bench.span(2, 3)]
    received = [bench.span(8, 2), bench.span(15), bench.span(11, 3)]
    until(alone.post(0, send=sent, recv=received).done)
    after, before = bench.read(), content()
    assert np.array_equal(after[[8, 9, 15, 11, 12, 13]], before[[0, 1, 5, 2, 3, 4]])
    assert np.array_equal(after[:8], before[:8])
    assert np.array_equal(after[[10, 14]], before[[10, 14]])
    alone.abort()
    until(alone.quiet)


def test_groups_run_one_after_the_other(bench: Bench) -> None:
    """What the second sends is what the first received."""
    alone = bench.alone()
    operations: list[Operation] = []
    for step in range(6):
        until(alone.ready)
        span = [bench.span(step)]
        operations.append(alone.post(0, send=span, recv=[bench.span(step + 1)]))
    for operation in reversed(operations):
        until(operation.done)
    assert all(operation.done() for operation in operations)
    assert (bench.read()[:7] == content()[0]).all()
    alone.abort()
    until(alone.quiet)


def test_nothing_happens_after_an_abort(bench: Bench) -> None:
    alone = bench.alone()
    alone.abort()
    until(alone.quiet)
    with pytest.raises(TransferFailed):
        alone.ready()
    assert np.array_equal(bench.read(), content())
    again = bench.alone()  # another is as good as new
    until(again.post(0, send=[bench.span(3)], recv=[bench.span(4)]).done)
    assert np.array_equal(bench.read()[4], content()[3])
    again.abort()


def test_ids_have_the_size_that_messages_have_room_for(bench: Bench) -> None:
    assert len(bench.communicators.unique_id()) == UNIQUE_ID_BYTES


def test_memory_of_the_wrong_kind_is_refused(bench: Bench) -> None:
    other = "VRAM" if bench.memory.memory_type == "DRAM" else "DRAM"
    with pytest.raises(TransferFailed, match="memory"):
        bench.communicators.open(replace(bench.memory, memory_type=other))


# Our code on cupy's calls.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Communicators:
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "1")
    on_a_stand_in(monkeypatch)
    return ours()


def vram() -> PoolMemory:
    return PoolMemory.block_major(0, 1, 1, np.zeros(1, dtype=np.int64), "VRAM", device_id=3)


def test_no_call_may_wait_and_the_thread_has_its_device(calls: Communicators) -> None:
    calls.open(vram())
    assert os.environ["NCCL_COMM_BLOCKING"] == "0"
    assert fake_cupy.Device.current == 3


def test_an_operation_is_not_done_before_it_reached_its_stream(calls: Communicators) -> None:
    calls.open(vram())
    alone = calls.join(calls.unique_id(), 0, ranks=1)
    until(alone.ready)
    data = np.arange(8, dtype=np.uint8)
    operation = alone.post(0, send=[(data.ctypes.data, 4)], recv=[(data.ctypes.data + 4, 4)])
    seen = []
    until(lambda: bool(seen.append(data[4]) or operation.done()))
    # Under way, then the copy, then the event behind it: an event recorded at once would have
    # been first.
    assert len(seen) > fake_cupy_nccl.STEPS
    assert data[4:].tolist() == [0, 1, 2, 3]


def test_an_error_of_nccl_is_one_of_ours(calls: Communicators) -> None:
    calls.open(vram())
    alone = calls.join(calls.unique_id(), 0, ranks=1)
    until(alone.ready)
    operation = alone.post(0)
    fake_cupy_nccl.NcclCommunicator.made[-1].fault = True
    for call in (alone.ready, operation.done):
        with pytest.raises(TransferFailed, match="remote process exited"):
            call()


def test_an_old_or_missing_nccl_is_named(
    monkeypatch: pytest.MonkeyPatch, calls: Communicators
) -> None:
    monkeypatch.setattr(fake_cupy_nccl.nccl, "get_version", lambda: 21400)
    with pytest.raises(TransferFailed, match="21400 is too old"):
        calls.open(vram())
    monkeypatch.setattr(fake_cupy_nccl.nccl, "available", False)
    with pytest.raises(TransferFailed, match="no NCCL"):
        calls.open(vram())
