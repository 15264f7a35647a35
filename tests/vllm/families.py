"""Tiny random models of families that this project's own engine does not know."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import make_tiny_model

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # of the usual 0.02 all tokens would be nearly alike
}


def make_moe(folder: Path) -> Path:
    """Qwen3-MoE: 4 experts, 2 for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return _save(folder, Qwen3MoeForCausalLM, Qwen3MoeConfig(**shape))


def make_gemma(folder: Path) -> Path:
    """Gemma 3: three layers of four see 48 tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(**SHAPE, sliding_window=48, layer_types=layers)
    return _save(folder, Gemma3ForCausalLM, config)


def make_phi(folder: Path) -> Path:
    """Phi-3 with long RoPE: 512 tokens by the short factors, 1,024 by the long ones."""
    from transformers import Phi3Config, Phi3ForCausalLM

    half = SHAPE["head_dim"] // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    lengths = {"max_position_embeddings": 1024, "original_max_position_embeddings": 512}
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    shape |= {"hidden_size": SHAPE["num_attention_heads"] * SHAPE["head_dim"]}
    config = Phi3Config(**shape | lengths, rope_parameters=rope)
    return _save(folder, Phi3ForCausalLM, config)


def _save(folder: Path, family: type, config: object) -> Path:
    """With the tokenizer and chat template of the other tiny models."""
    make_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    family(config).float().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
