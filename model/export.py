"""Writes a model as a Hugging Face folder, which transformers and vLLM load. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossdock.model.config import ModelConfig, load_config
from crossdock.model.store import INDEX, ModelFiles, Progress, check_room, resolve, weight_files
from crossdock.model.tensors import tensor_shapes
from crossdock.model.tokenizer_parts import TokenizerParts
from crossdock.proto.errors import ConfigError, ModelError

BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")  # of a folder


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even; as the bits, which is all that numpy has of them."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class _Type:
    code: str  # safetensors' name of it
    size: int  # bytes of an element
    largest: float  # that rounds to no infinity
    of: Callable[[np.ndarray], np.ndarray]  # from float32


DTYPES: Mapping[str, _Type] = {
    "float32": _Type("F32", 4, float(np.finfo(np.float32).max), lambda values: values),
    "bfloat16": _Type("BF16", 2, 3.3895e38, _bfloat16),
    "float16": _Type("F16", 2, 65504.0, lambda values: values.astype(np.float16)),
}


def export_model(
    model_id: str,
    folder: Path,
    home: Path,
    dtype: str = "auto",
    *,
    force: bool = False,
    progress: Progress = lambda line: None,
) -> Path:
    """Writes the model that `resolve` finds to a new or empty folder, with `force` in place of the
    model that the folder holds; returns its path. `dtype` is of DTYPES, or auto for the model's
    own, as which a model that is a folder already is copied.

    The folder is there whole or not at all. Raises ConfigError, or ModelError.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError("dtype", f"{dtype!r} must be one of auto, {', '.join(DTYPES)}")
    files, folder = resolve(model_id, home), folder.expanduser().resolve()
    if files.format == "bytes":
        raise ModelError(f"model {model_id!r} has no weights, so there is nothing to export")
    try:
        _check_target(folder, files.path.resolve(), force)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder) as fresh:
            write = _copy_folder if files.format == "hf" else _convert_gguf
            write(files, fresh, dtype, progress)
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: {error.strerror or error}") from error
    return folder


def _check_target(folder: Path, source: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"folder: {folder} is a file; it must be a new or an empty folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise ModelError(f"folder: {folder} is not empty; --force replaces the model in it")
    if folder == source or folder in source.parents:
        raise ModelError(f"folder: {folder} holds the model that is to be exported, {source}")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"folder: {folder} is not empty and holds no config.json: --force replaces models alone"
        )


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` once everything is in it."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        fresh, old = Path(scratch, "new"), Path(scratch, "old")
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _copy_folder(files: ModelFiles, fresh: Path, dtype: str, progress: Progress) -> None:
    own = load_config(files).dtype
    if dtype not in ("auto", own):
        raise ConfigError("dtype", f"{dtype!r} must be auto or {own}: {files.path} is copied as is")
    sources = list(weight_files(files.path).values())
    for pattern in BESIDE_WEIGHTS:
        sources += [path for path in files.path.glob(pattern) if _belongs(path)]
    size = sum(path.stat().st_size for path in sources)
    check_room(fresh, size)
    progress(f"copying {len(sources)} files ({size / 1e6:.0f} MB) of {files.path}")
    for path in sources:
        shutil.copyfile(path, fresh / path.name)


def _belongs(path: Path) -> bool:
    """Not what tells of weights in another format."""
    return path.is_file() and (path.name == INDEX or not path.name.endswith(".index.json"))


def _convert_gguf(files: ModelFiles, fresh: Path, dtype: str, progress: Progress) -> None:
    from crossdock.model.gguf_tokenizer import read_gguf_tokenizer

    config, parts = load_config(files), read_gguf_tokenizer(files.path)
    dtype = config.dtype if dtype == "auto" else dtype
    size = sum(math.prod(shape) for shape in tensor_shapes(config).values()) * DTYPES[dtype].size
    check_room(fresh, size)
    ids = _token_ids(config, parts)
    for name, value in {
        "config.json": _hf_config(config, files.path) | ids | {"torch_dtype": dtype},
        "generation_config.json": ids,
        "tokenizer_config.json": _tokenizer_config(config, parts),
        "special_tokens_map.json": dict(parts.special),
    }.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (fresh / name).write_text(text, encoding="utf-8")
    told = parts.tokenizer.to_str(pretty=True)
    (fresh / "tokenizer.json").write_text(told, encoding="utf-8")
    progress(f"writing the weights as {dtype} ({size / 1e6:.0f} MB)")
    _write_weights(files.path, config, DTYPES[dtype], fresh / "model.safetensors")


def _token_ids(config: ModelConfig, parts: TokenizerParts) -> dict[str, Any]:
    """bos_token_id, eos_token_id (all that end an answer), pad_token_id: those that there are."""
    special = {name: text for name, text in parts.special.items() if name != "unk_token"}
    ids: dict[str, Any] = {
        f"{name}_id": parts.tokenizer.token_to_id(text) for name, text in special.items()
    }
    eos = list(config.eos_token_ids)
    return ids | ({"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {})


def _tokenizer_config(config: ModelConfig, parts: TokenizerParts) -> dict[str, Any]:
    told: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **parts.special,
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
    }
    if [*parts.template] == ["default"]:
        told["chat_template"] = parts.template["default"]
    elif parts.template:
        named = [{"name": name, "template": text} for name, text in parts.template.items()]
        told["chat_template"] = named
    return told


def _hf_config(config: ModelConfig, source: Path) -> dict[str, Any]:
    """config.json without dtype and special tokens. Llamas with a window are called mistral."""
    windowed = config.architecture == "llama" and config.sliding_window
    architecture = "mistral" if windowed else config.architecture
    told = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _hf_rope_scaling(config, source),
        "max_position_embeddings": config.context_length,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if architecture.startswith("qwen"):
        told["use_sliding_window"] = config.sliding_window is not None
        told["max_window_layers"] = config.sliding_window_from
    return told


def _hf_rope_scaling(config: ModelConfig, source: Path) -> dict[str, Any] | None:
    """A GGUF file has llama3 scaling as a divisor of each frequency: they are compared with those
    that Llama 3's constants make (Llama 3.1 model card). Raises ModelError for others."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "factors":
        return dict(scaling) if scaling else None
    found = np.asarray(scaling["factors"])
    factor, low, high, context = round(float(found.max()), 4), 1.0, 4.0, 8192
    half = config.head_dim // 2
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(half) / half)
    kept = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if found.shape != (half,) or not np.allclose(1 / (kept + (1 - kept) / factor), found, 1e-3):
        raise ModelError(f"{source}: tensor rope_freqs.weight: no scaling of Llama 3 makes these")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _write_weights(source: Path, config: ModelConfig, dtype: _Type, path: Path) -> None:
    """One safetensors file, a tensor at a time: 8 bytes of length, so many of JSON, the tensors."""
    from crossdock.model.gguf_file import open_gguf
    from crossdock.model.gguf_weights import read_gguf_tensor

    gguf, shapes = open_gguf(source), tensor_shapes(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.size
        header[name] = {"dtype": dtype.code, "shape": shape, "data_offsets": [start, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, shape in shapes.items():
            values = np.empty(shape, np.float32)
            read_gguf_tensor(gguf, config, name, values)
            largest = float(np.abs(values).max())
            if not largest <= dtype.largest:  # nor is NaN
                limit = f"{dtype.code} holds no more than {dtype.largest:g}"
                raise ModelError(f"{source}: tensor {name}: {largest:g}: {limit}")
            file.write(dtype.of(values).data)
        file.flush()
        os.fsync(file.fileno())
