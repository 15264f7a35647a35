"""Tiny random-weight models in Hugging Face layout, written without transformers.

Each has a byte-level BPE tokenizer that was trained on a few lines here and a chat template, so
text in, text out works; what the model says is noise, but the same noise on every run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from crossdock.model.gguf_file import gguf_name

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "A crossdock is the terminal where freight leaves an inbound truck and goes straight onto",
    "an outbound one. Prefill workers are the inbound side, decode workers the outbound side.",
    "The capital of France is Paris. The capital of Italy is Rome. Count: 1, 2, 3, 4, 5, 6.",
    "Grüße aus Köln, žluťoučký kůň, 你好，世界, こんにちは, привет мир, 🙂🚚📦",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))\n",
]


def make_tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 128,
    context_length: int = 2048,
    sliding_window: int | None = None,
    tied: bool | None = None,
    vocab_size: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes the model folder and returns it. Its vocabulary is the tokenizer's, or `vocab_size`
    where that is more. Llama gets llama3 RoPE scaling; `tied` defaults
    to True for qwen2 and qwen3 alone, whose first layer stays without `sliding_window`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = max(vocab_size, _write_tokenizer(folder, context_length))
    tied = architecture.startswith("qwen") if tied is None else tied
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if architecture == "llama":
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    if architecture == "mistral":
        config["sliding_window"] = sliding_window
    elif sliding_window:
        window = {"use_sliding_window": True, "sliding_window": sliding_window}
        config |= window | {"max_window_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = _random_tensors(config, torch.Generator().manual_seed(seed))
    _write_safetensors(folder, {name: t.to(dtype) for name, t in tensors.items()}, shards)
    return folder


def _random_tensors(config: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    inner = config["intermediate_size"]

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (scale / columns**0.5)

    def near(value: float, size: int) -> torch.Tensor:
        return value + 0.2 * torch.randn(size, generator=generator)

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 8.0),
        "model.norm.weight": near(1.0, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": near(1.0, hidden),
            at + "post_attention_layernorm.weight": near(1.0, hidden),
            at + "self_attn.q_proj.weight": matrix(query, hidden),
            at + "self_attn.k_proj.weight": matrix(key, hidden),
            at + "self_attn.v_proj.weight": matrix(key, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, query),
            at + "mlp.gate_proj.weight": matrix(inner, hidden),
            at + "mlp.up_proj.weight": matrix(inner, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, inner),
        }
        if config["model_type"] == "qwen2":
            tensors |= {
                at + "self_attn.q_proj.bias": near(0.0, query),
                at + "self_attn.k_proj.bias": near(0.0, key),
                at + "self_attn.v_proj.bias": near(0.0, key),
            }
        if config["model_type"] == "qwen3":
            tensors |= {
                at + "self_attn.q_norm.weight": near(1.0, head_dim),
                at + "self_attn.k_norm.weight": near(1.0, head_dim),
            }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 4.0)
    return tensors


def _write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(folder: Path, context_length: int) -> int:
    """Trains and writes the tokenizer; returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": context_length,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return tokenizer.get_vocab_size()


def write_gguf(
    folder: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType,
    odd: Mapping[str, type] = MappingProxyType({}),
) -> None:
    """Turns a folder of make_tiny_model into a GGUF as converters write them: q and k interleaved,
    llama3 scaling as divisors. `odd` tensors are written as plain numbers of another type."""
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    if scaling := config.get("rope_scaling"):
        writer.add_tensor("rope_freqs.weight", _divisors(config, **scaling))
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(values) // config["head_dim"]
            halves = values.reshape(heads, 2, config["head_dim"] // 2, -1)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        if name in odd:
            writer.add_tensor(gguf_name(name), values.astype(odd[name]))
            continue
        kind_here = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(values, kind_here)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _divisors(
    config: dict,
    rope_type: str,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """Of each frequency, as llama.cpp's converter has them for llama3."""
    found = []
    for index in range(0, config["head_dim"], 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (index / config["head_dim"])
        turns = original_max_position_embeddings / wavelength
        smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        if turns > high_freq_factor:
            found.append(1.0)
        else:
            found.append(factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, told: dict) -> None:
    vocab, special = told["model"]["vocab"], {token["content"] for token in told["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
