"""What a model is: its shape, read from config.json or from GGUF metadata. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.proto.errors import ModelError

if TYPE_CHECKING:
    from crossdock.model.gguf_file import GGUFFile
    from crossdock.model.store import ModelFiles

ROPE_TYPES = {  # and what each needs to be told
    "linear": ("factor",),
    "factors": ("factors",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# How each architecture differs from plain Llama.
FAMILIES: Mapping[str, Mapping[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family model; sizes in elements, context_length in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    context_length: int
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: Mapping[str, Any] | None = None  # rope_type is one of ROPE_TYPES
    sliding_window: int | None = None  # tokens that a token sees, itself included
    sliding_window_from: int = 0  # the first layer that has the window
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # the dtype of the weights as shipped

    @property
    def query_size(self) -> int:
        """Elements of a row's queries over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of a row's keys (or values) over all KV heads."""
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int:
        """Tokens that a token of this layer sees, itself included; 0 means all."""
        return self.sliding_window or 0 if layer >= self.sliding_window_from else 0


@dataclass(frozen=True)
class TextLimits:
    """What whoever only reads and writes a model's tokens knows of it, of any family."""

    vocab_size: int
    context_length: int  # tokens
    eos_token_ids: tuple[int, ...]


# The model without weights: END and the 256 bytes.
_BYTES = ModelConfig(
    *("bytes", 257, 0, 0, 0, 0, 0, 0, 0.0, 0.0, True), context_length=262_144, eos_token_ids=(0,)
)


def load_config(files: ModelFiles) -> ModelConfig:
    """Raises ModelError naming file and field for whatever is missing, wrong or unsupported."""
    if files.format == "bytes":
        return _BYTES
    if files.format == "gguf":
        from crossdock.model.gguf_file import open_gguf

        config = _from_gguf(open_gguf(files.path))
    else:
        config = _from_hf(files.path)
    _check(config, files.path)
    return config


def load_limits(files: ModelFiles) -> TextLimits:
    """Raises ModelError naming file and field for whatever is missing or wrong."""
    if files.format != "hf":
        config = load_config(files)
        return TextLimits(config.vocab_size, config.context_length, config.eos_token_ids)
    path = files.path / "config.json"
    whole = read_json(path)
    # Models of more than text keep what is of its own apart.
    inner = whole.get("text_config")
    raw = _Fields(whole | (inner if isinstance(inner, dict) else {}), path)
    limits = TextLimits(
        raw.integer("vocab_size"),
        raw.integer("max_position_embeddings"),
        _union(whole.get("eos_token_id"), raw.get("eos_token_id"), _generation_eos(files.path)),
    )
    for name in ("vocab_size", "context_length"):
        if getattr(limits, name) < 1:
            raise ModelError(f"{path}: {name}: {getattr(limits, name)} must be at least 1")
    return limits


def _generation_eos(folder: Path) -> int | list[int] | None:
    path = folder / "generation_config.json"
    found: int | list[int] | None = read_json(path).get("eos_token_id") if path.exists() else None
    return found


def _from_hf(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    raw = _Fields(read_json(path), path)
    for field in ("quantization_config", "compression_config"):
        if how := raw.get(field):
            method = how.get("quant_method") or how.get("format") if isinstance(how, dict) else how
            raise ModelError(
                f"{path}: {field}: weights quantized by {method} are not supported; get the model "
                "unquantized, or as GGUF"
            )
    architecture = str(raw.get("model_type", ""))
    if architecture not in FAMILIES:
        raise ModelError(
            f"{path}: model_type {architecture!r} is not supported; one of {', '.join(FAMILIES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act must be silu")
    for field in ("mlp_bias", "attention_bias"):
        if raw.get(field) and architecture != "qwen2":
            raise ModelError(f"{path}: {field} is not supported for {architecture}")
    heads, hidden = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    layers = raw.integer("num_hidden_layers")
    rope_theta, rope_scaling = _hf_rope(raw)
    window, window_from = _hf_window(raw, architecture, layers)
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=raw.integer("head_dim", hidden // max(1, heads)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        context_length=raw.integer("max_position_embeddings"),
        **FAMILIES[architecture],
        sliding_window=window,
        sliding_window_from=window_from,
        eos_token_ids=_union(raw.get("eos_token_id"), _generation_eos(folder)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def _hf_rope(raw: _Fields) -> tuple[float, Mapping[str, Any] | None]:
    """Theta and scaling, from `rope_parameters` (newer) or `rope_scaling` + `rope_theta`."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelError(f"{raw.path}: rope_scaling: {parameters!r} is not a table")
    theta = float(parameters.get("rope_theta") or raw.number("rope_theta", 10000.0))
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if float(parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1)) != 1:
        raise ModelError(f"{raw.path}: partial_rotary_factor other than 1 is not supported")
    if rope_type == "default":
        return theta, None
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{raw.path}: rope_type {rope_type!r} is not supported")
    for name in ROPE_TYPES[rope_type]:
        if not isinstance(parameters.get(name), (int, float)):
            raise ModelError(f"{raw.path}: rope_scaling: {name}: {parameters.get(name)!r}")
    return theta, {**parameters, "rope_type": rope_type}


def _hf_window(raw: _Fields, architecture: str, layers: int) -> tuple[int | None, int]:
    window = raw.get("sliding_window")
    if architecture == "mistral":
        return window, 0
    if not (architecture.startswith("qwen") and raw.get("use_sliding_window") and window):
        return None, 0
    return window, raw.integer("max_window_layers", layers)


def _from_gguf(gguf: GGUFFile) -> ModelConfig:
    architecture = str(gguf.require("general.architecture"))
    if architecture not in FAMILIES:
        raise ModelError(
            f"{gguf.path}: general.architecture {architecture!r} is not supported; "
            f"one of {', '.join(FAMILIES)}"
        )

    def field(name: str, default: Any = None) -> Any:
        key = f"{architecture}.{name}"
        return gguf.require(key) if default is None else gguf.metadata.get(key, default)

    heads, hidden = int(field("attention.head_count")), int(field("embedding_length"))
    head_dim = int(field("attention.key_length", hidden // max(1, heads)))
    if int(field("rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(f"{gguf.path}: {architecture}.rope.dimension_count must be {head_dim}")
    embedding = gguf.tensor("token_embd.weight")
    eos_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(embedding.shape[-1]),
        hidden_size=hidden,
        intermediate_size=int(field("feed_forward_length")),
        num_layers=int(field("block_count")),
        num_heads=heads,
        num_kv_heads=int(field("attention.head_count_kv", heads)),
        head_dim=head_dim,
        rope_theta=float(field("rope.freq_base", 10000.0)),
        rope_scaling=_gguf_rope_scaling(gguf, architecture),
        rms_norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        context_length=int(field("context_length")),
        **FAMILIES[architecture],
        sliding_window=int(field("attention.sliding_window", 0)) or None,
        eos_token_ids=_union(*(gguf.metadata.get(f"tokenizer.ggml.{key}") for key in eos_keys)),
        dtype="float16",
    )


def _gguf_rope_scaling(gguf: GGUFFile, architecture: str) -> Mapping[str, Any] | None:
    """llama3 scaling is shipped as one divisor per frequency in the tensor rope_freqs.weight."""
    if "rope_freqs.weight" in gguf.tensors:
        factors = gguf.tensor("rope_freqs.weight").data
        return {"rope_type": "factors", "factors": tuple(float(factor) for factor in factors)}
    rope_type = gguf.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if rope_type == "none":
        return None
    if rope_type != "linear":
        raise ModelError(f"{gguf.path}: rope scaling {rope_type!r} is not supported")
    return {"rope_type": "linear", "factor": gguf.require(f"{architecture}.rope.scaling.factor")}


def _check(config: ModelConfig, path: Path) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    for name in (*sizes, "num_kv_heads", "head_dim", "context_length"):
        if getattr(config, name) < 1:
            raise ModelError(f"{path}: {name}: {getattr(config, name)} must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{path}: {config.num_heads} heads are no multiple of {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path}: head_dim {config.head_dim} must be even")


def _union(*values: int | list[int] | None) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for value in values:
        if value is not None:
            ids |= dict.fromkeys([value] if isinstance(value, int) else value)
    return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True)
class _Fields:
    values: dict[str, Any]
    path: Path

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"{self.path}: {name}: {value!r} is not a number")
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value != int(value) or value < 0:
            raise ModelError(f"{self.path}: {name}: {value!r} is not a whole number")
        return int(value)
