"""Which tensors a model has, and whether a checkpoint has those and no others (biases, scales of a
quantization), without which what is read would be garbage. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np

from crossdock.model.config import ModelConfig
from crossdock.proto.errors import ModelError

Shape = tuple[int, ...]
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what is read
UNUSED = ("rotary_emb.inv_freq", "rope_freqs.weight")  # what they hold is made of the configuration


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model: Hugging Face name to [rows, columns] or [size]."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    rows = {"q_proj": config.query_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        **{f"self_attn.{name}.weight": (size, hidden) for name, size in rows.items()},
        "self_attn.o_proj.weight": (hidden, config.query_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{name}.bias": (size,) for name, size in rows.items()}
    if config.qk_norm:
        layer |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_tensors(
    path: Path,
    config: ModelConfig,
    found: Mapping[str, tuple[str, Shape]],
    readable: Callable[[str], bool] = FLOATS.__contains__,
    name_of: Callable[[str], str] = str,
) -> None:
    """found: dtype and shape of each tensor at `path`. name_of: Hugging Face's name to its own.

    Raises ModelError naming the first tensor that is unexpected, missing, or cannot be read.
    """
    expected = {name_of(name): shape for name, shape in tensor_shapes(config).items()}
    tied = config.tie_word_embeddings and name_of("lm_head.weight")
    for name, (dtype, _) in found.items():
        if not (name in expected or name == tied or name.endswith(UNUSED)):
            raise ModelError(
                f"{path}: tensor {name} ({dtype}) is not supported: a {config.architecture} model "
                "is read without it, so this checkpoint is quantized or of another kind"
            )
    for name, wanted in expected.items():
        if name not in found:
            raise ModelError(f"{path}: tensor {name} is missing")
        dtype, shape = found[name]
        if not readable(dtype):
            raise ModelError(f"{path}: tensor {name}: dtype {dtype} is not supported")
        check_shape(path, name, shape, wanted)


def check_shape(path: Path, name: str, shape: Shape, wanted: Shape) -> None:
    """Raises ModelError naming file and tensor where the shapes differ."""
    if shape != wanted:
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, not {list(wanted)}")


@functools.cache
def can_dequantize(kind: str) -> bool:
    """Whether the gguf package knows this type of GGML's, by its name."""
    type_ = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[type_][1]), dtype=np.uint8), type_)
    except NotImplementedError:
        return False
    return True
