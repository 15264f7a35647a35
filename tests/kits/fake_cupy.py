"""As much of cupy as kvtransfer calls, over host memory: its VRAM is any numpy array.

What it keeps of the real one is the signatures, and that work on a stream is done only when the
stream was asked for it.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable

import pytest

DEVICE_TO_HOST = 2


class Stream:
    made: list[Stream] = []  # noqa: RUF012

    def __init__(self, *, non_blocking: bool) -> None:
        assert non_blocking, "it would wait for the engine's kernels, and they for it"
        self.work: list[Callable[[], object]] = []
        Stream.made.append(self)
        self.ptr = len(Stream.made)

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()


class Device:
    current = 0

    def __init__(self, device_id: int) -> None:
        self.id = device_id

    def use(self) -> None:
        Device.current = self.id

    def __enter__(self) -> Device:
        self._before, Device.current = Device.current, self.id
        return self

    def __exit__(self, *_: object) -> None:
        Device.current = self._before


def stream_of(pointer: int) -> Stream:
    return Stream.made[pointer - 1]


def alloc_pinned_memory(nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
    """cupy rounds up, too."""
    pages = (ctypes.c_uint8 * (nbytes + 512),)
    return type("PinnedMemoryPointer", pages, {"ptr": property(ctypes.addressof)})()  # type: ignore[no-any-return]


def memcpy2DAsync(
    dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
) -> None:
    assert kind == DEVICE_TO_HOST
    assert width <= min(dpitch, spitch)

    def copy() -> None:
        for row in range(height):
            ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

    stream_of(stream).work.append(copy)


def install(monkeypatch: pytest.MonkeyPatch, **cuda: object) -> types.ModuleType:
    """`import cupy` finds this for the length of a test."""
    module = types.ModuleType("cupy")
    runtime = types.SimpleNamespace(
        memcpy2DAsync=memcpy2DAsync, memcpyDeviceToHost=DEVICE_TO_HOST, getDeviceCount=lambda: 8
    )
    parts = {
        "Device": Device,
        "Stream": Stream,
        "alloc_pinned_memory": alloc_pinned_memory,
        "runtime": runtime,
        **cuda,
    }
    module.cuda = types.ModuleType("cupy.cuda")  # type: ignore[attr-defined]
    for name, part in parts.items():
        setattr(module.cuda, name, part)
    Stream.made.clear()
    Device.current = 0
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda", module.cuda)
    return module
