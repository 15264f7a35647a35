"""Reading weights: one tensor at a time, by Hugging Face name, from safetensors or GGUF.

Nothing is read before it is asked for, so that a model never lies in memory twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from crossdock.engine.native.weights.dequantize import dequantize
from crossdock.model.config import ModelConfig
from crossdock.model.gguf_file import GGUFFile, gguf_name, open_gguf
from crossdock.model.store import ModelFiles, weight_files, weight_map
from crossdock.proto.errors import ModelError


class Weights(Protocol):
    """Tensors of one model by their Hugging Face names."""

    def read(self, name: str, out: torch.Tensor) -> None:
        """Fills `out`, a contiguous tensor on the CPU of any float dtype. Raises ModelError naming
        file and tensor when it is missing, unreadable or not of out's shape."""


def load_weights(files: ModelFiles, config: ModelConfig) -> Weights:
    """Raises ModelError naming the file that is missing, truncated or corrupt."""
    if files.format == "gguf":
        return GGUFWeights(open_gguf(files.path), config)
    return SafetensorsWeights(files.path)


class SafetensorsWeights:
    """Of all shards of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, tuple[Path, safe_open]] = {}  # by the tensors that they hold
        named = weight_map(folder)
        for name, path in sorted(weight_files(folder).items()):
            try:
                shard = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: truncated or corrupt: {error}") from error
            tensors = [each for each in shard.keys() if named.get(each, name) == name]  # noqa: SIM118
            self._shards |= dict.fromkeys(tensors, (path, shard))

    def read(self, name: str, out: torch.Tensor) -> None:
        """Copies a tensor into `out`, converting its type. Raises ModelError for another shape."""
        if name not in self._shards:
            raise ModelError(f"{self._folder}: tensor {name} is missing")
        path, shard = self._shards[name]
        try:
            tensor = shard.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name}: {error}") from error
        _check(name, tuple(tensor.shape), out, path)
        out.copy_(tensor)


class GGUFWeights:
    """Dequantized on reading. Of llama models the rows of q and k are put back in half-split
    order: the file keeps the two halves of each head interleaved."""

    def __init__(self, source: GGUFFile, config: ModelConfig) -> None:
        self._source, self._config = source, config

    def read(self, name: str, out: torch.Tensor) -> None:
        """Dequantizes a tensor into `out`, by its Hugging Face name. Raises ModelError."""
        path, file_name = self._source.path, gguf_name(name)
        tensor = self._source.tensor(file_name)
        _check(file_name, tuple(int(size) for size in reversed(tensor.shape)), out, path)
        values = out if out.dtype == torch.float32 else torch.empty(out.shape)
        try:
            rows = self._half_split(file_name, np.asarray(tensor.data))
            dequantize(rows, tensor.tensor_type, values.numpy())
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise ModelError(f"{path}: tensor {file_name} ({kind}): {error}") from error
        if values is not out:
            out.copy_(values)

    def _half_split(self, name: str, rows: np.ndarray) -> np.ndarray:
        heads = {"attn_q": self._config.num_heads, "attn_k": self._config.num_kv_heads}
        parts = name.split(".")
        if self._config.architecture != "llama" or len(parts) != 4 or parts[2] not in heads:
            return rows
        count = heads[parts[2]]
        pairs = rows.reshape(count, len(rows) // count // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _check(name: str, shape: tuple[int, ...], out: torch.Tensor, path: Path) -> None:
    if shape != tuple(out.shape):
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, not {list(out.shape)}")
