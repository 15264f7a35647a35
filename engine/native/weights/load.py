"""Reading weights: one tensor at a time, by Hugging Face name, from safetensors or GGUF.

Nothing is read before it is asked for, so that a model never lies in memory twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from crossdock.engine.native.weights.dequantize import dequantize
from crossdock.model.config import ModelConfig
from crossdock.model.gguf_file import GGUFFile, gguf_name, open_gguf
from crossdock.proto.errors import ModelError

if TYPE_CHECKING:
    from crossdock.model.store import ModelFiles


class Weights(Protocol):
    """Tensors of one model by their Hugging Face names."""

    def read(self, name: str, out: torch.Tensor) -> None:
        """Fills `out`, a contiguous tensor on the CPU of any float dtype. Raises ModelError naming
        file and tensor when it is missing, unreadable or not of out's shape."""
        ...


def load_weights(files: ModelFiles, config: ModelConfig) -> Weights:
    """Raises ModelError naming the file that is missing, truncated or corrupt."""
    if files.format == "gguf":
        return GGUFWeights(open_gguf(files.path), config)
    return SafetensorsWeights(files.path)


class SafetensorsWeights:
    """The shards that model.safetensors.index.json names, or every .safetensors of the folder."""

    def __init__(self, folder: Path) -> None:
        self._open: dict[Path, safe_open] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._files = _read_index(index)
        else:
            self._files = {}
            for path in sorted(folder.glob("*.safetensors")):
                self._files |= dict.fromkeys(self._shard(path).keys(), path)
        self._folder = folder

    def read(self, name: str, out: torch.Tensor) -> None:
        """Copies a tensor into `out`, converting its type. Raises ModelError for another shape."""
        if name not in self._files:
            raise ModelError(f"{self._folder}: tensor {name} is missing")
        path = self._files[name]
        shard = self._shard(path)
        try:
            tensor = shard.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name}: {error}") from error
        _check(name, tuple(tensor.shape), out, path)
        out.copy_(tensor)

    def _shard(self, path: Path) -> safe_open:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                reason = "missing" if not path.exists() else f"truncated or corrupt: {error}"
                raise ModelError(f"{path}: {reason}") from error
        return self._open[path]


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


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: path.parent / Path(file_name).name for name, file_name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not an index of safetensors shards: {error!r}") from error


def _check(name: str, shape: tuple[int, ...], out: torch.Tensor, path: Path) -> None:
    if shape != tuple(out.shape):
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, not {list(out.shape)}")
