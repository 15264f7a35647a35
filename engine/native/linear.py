"""Linear layers: plain, or with the weight packed for oneDNN (fp32 on a CPU)."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn import functional

SIZES_PER_OCTAVE = 8  # of the row counts that reach a packed layer beyond 2 * this


class Linear(Protocol):
    """y = x · weightᵀ + bias, x [rows, in] → [rows, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + self(x); `residual` is given up: the result may lie in its memory."""


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """A packed layer keeps its own arrangement of `weight` [out, in], a plain one the tensor."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and _can_pack():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


@functools.cache
def padded_rows(rows: int) -> int:
    """`rows` rounded up to a multiple of an eighth of the power of two below: an eighth more at
    most. oneDNN compiles code for each number of rows and keeps it, half a MB a layer shape."""
    step = max(1, (1 << (rows - 1).bit_length()) // (2 * SIZES_PER_OCTAVE))
    return -(-rows // step) * step


def _can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )


class PlainLinear:
    """torch's own product; weight is [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual [rows, out] += x [rows, in] @ weight.T + bias, in place."""
        return residual.add_(self(x))


class PackedLinear:
    """Two to three times as fast as F.linear at 8 to 256 rows, since oneDNN need not reorder the
    weight on each call. Rows are padded to a few sizes, which bounds what oneDNN keeps."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_add = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        padded = _padded(x)
        y = self._linear(padded, self._weight, self._bias, "none", [], "")
        return y if padded is x else y[: len(x)]

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + x @ weight.T + bias, [rows, out], in one fused call."""
        if padded_rows(len(x)) != len(x):
            return residual.add_(self(x))
        return self._linear_add(x, residual, self._weight, self._bias, "add")


def _padded(x: torch.Tensor) -> torch.Tensor:
    extra = padded_rows(len(x)) - len(x)
    return functional.pad(x, (0, 0, 0, extra)) if extra else x
