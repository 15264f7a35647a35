"""The weights of a GGUF file as a Hugging Face model has them. Imports no torch."""

from __future__ import annotations

import numpy as np

from crossdock.model.config import ModelConfig
from crossdock.model.dequantize import dequantize
from crossdock.model.gguf_file import GGUFFile, gguf_name
from crossdock.model.tensors import check_shape
from crossdock.proto.errors import ModelError


def read_gguf_tensor(source: GGUFFile, config: ModelConfig, name: str, out: np.ndarray) -> None:
    """Dequantizes a tensor, by its Hugging Face name, into `out`: float32 C-contiguous. Of llama
    models the rows of q and k are put back in half-split order: the file keeps the two halves of
    each head interleaved. Raises ModelError naming file and tensor."""
    path, file_name = source.path, gguf_name(name)
    tensor = source.tensor(file_name)
    check_shape(path, file_name, tuple(int(size) for size in reversed(tensor.shape)), out.shape)
    try:
        rows = _half_split(file_name, np.asarray(tensor.data), config)
        dequantize(rows, tensor.tensor_type, out)
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        raise ModelError(f"{path}: tensor {file_name} ({kind}): {error}") from error


def _half_split(name: str, rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    parts = name.split(".")
    if config.architecture != "llama" or len(parts) != 4 or parts[2] not in heads:
        return rows
    count = heads[parts[2]]
    pairs = rows.reshape(count, len(rows) // count // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
