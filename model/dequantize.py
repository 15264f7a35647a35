"""GGUF's commonest quantizations turned to float32, whole slabs of rows at a time.

The gguf package does it 16 rows at a time, which takes seconds for a model of 135M parameters;
it serves every format that is not here. Formats: ggml-quants.h of the GGML project.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

SLAB_BYTES = 256 << 10  # of quantized input: what it becomes still fits a cache


def dequantize(rows: np.ndarray, kind: Kind, out: np.ndarray) -> None:
    """Writes `rows` (as ReaderTensor.data gives them: [..., bytes] or plain numbers) to `out`,
    float32 C-contiguous with as many elements. Raises ValueError, NotImplementedError."""
    if kind not in _BLOCKS:
        out[...] = gguf.dequantize(rows, kind).reshape(out.shape)
        return
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.asarray(rows).reshape(-1, block_bytes)
    target = out.reshape(-1, block_elements)
    if len(blocks) != len(target):
        raise ValueError(f"{len(blocks)} blocks for {out.size} elements")
    step = max(1, SLAB_BYTES // block_bytes)
    for start in range(0, len(blocks), step):
        _BLOCKS[kind](blocks[start : start + step], target[start : start + step])


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at `offset` of each block, as float32 [blocks, 1]."""
    return blocks[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    scale = _half(blocks, 0)
    np.multiply(blocks[:, 2:] & 15, scale, out=out[:, :16])
    np.multiply(blocks[:, 2:] >> 4, scale, out=out[:, 16:])
    out -= 8 * scale


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    scale = _half(blocks, 0)
    np.multiply(blocks[:, 4:] & 15, scale, out=out[:, :16])
    np.multiply(blocks[:, 4:] >> 4, scale, out=out[:, 16:])
    out += _half(blocks, 2)


_BLOCKS: dict[Kind, Callable[[np.ndarray, np.ndarray], None]] = {
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
}
