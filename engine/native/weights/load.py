"""Reading weights: one tensor at a time, by Hugging Face name, from safetensors or GGUF.

Nothing is read before it is asked for, so that a model never lies in memory twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from crossdock.model.config import ModelConfig
from crossdock.model.gguf_file import GGUFFile, open_gguf
from crossdock.model.gguf_weights import read_gguf_tensor
from crossdock.model.store import ModelFiles, weight_files, weight_map
from crossdock.model.tensors import check_shape
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
        check_shape(path, name, tuple(tensor.shape), tuple(out.shape))
        out.copy_(tensor)


class GGUFWeights:
    """Dequantized on reading."""

    def __init__(self, source: GGUFFile, config: ModelConfig) -> None:
        self._source, self._config = source, config

    def read(self, name: str, out: torch.Tensor) -> None:
        """Dequantizes a tensor into `out`, by its Hugging Face name. Raises ModelError."""
        values = out if out.dtype == torch.float32 else torch.empty(out.shape)
        read_gguf_tensor(self._source, self._config, name, values.numpy())
        if values is not out:
            out.copy_(values)
