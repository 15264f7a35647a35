"""Reading models: sharded, GGUF, other RoPE and dtype forms, and every kind of broken file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model, write_gguf

from crossdock.engine.native.rope import rope_table
from crossdock.engine.native.runner import ModelRunner
from crossdock.engine.native.weights.load import load_weights
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.config import load_config
from crossdock.model.dequantize import dequantize
from crossdock.model.store import INDEX, ModelFiles, resolve
from crossdock.proto.errors import ConfigError, ModelError
from crossdock.proto.types import SamplingParams


def logits(files: ModelFiles, **options: object) -> torch.Tensor:
    runner = ModelRunner(files, num_blocks=4, device="cpu", **options)
    ids = [1, 50, 200, 7, 7, 90, 33, 120, 300, 5] * 3
    sequence = Sequence("s", ids, len(ids), SamplingParams(), block_table=[2, 0])
    return runner.logits(StepPlan((Chunk(sequence, 0, len(ids), True),)), every_token=True)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_shards_equal_one_file(tmp_path: Path) -> None:
    one = make_tiny_model(tmp_path / "one", "qwen3")
    three = make_tiny_model(tmp_path / "three", "qwen3", shards=3)
    assert len(list(three.glob("*.safetensors"))) == 3
    assert torch.equal(logits(resolve(str(one))), logits(resolve(str(three))))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_equals_safetensors(tmp_path: Path, architecture: str) -> None:
    folder = make_tiny_model(tmp_path / "hf", architecture)
    edit_config(folder, rope_scaling=None)
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, gguf.GGMLQuantizationType.F32)
    files = resolve(str(path))
    ours, theirs = load_config(files), load_config(resolve(str(folder)))
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == (2,)
    assert torch.allclose(logits(files), logits(resolve(str(folder))), atol=1e-5)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_dequantized_as_the_gguf_package_does(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(0).normal(size=(70, 96)).astype(np.float32)
    rows = gguf.quantize(values, kind)
    out = np.empty_like(values)
    dequantize(rows, kind, out)
    assert np.array_equal(out, gguf.dequantize(rows, kind))
    assert np.abs(out - values).max() < 0.5


def test_llama3_factors_of_gguf_equal_the_scaling(tmp_path: Path) -> None:
    """GGUF ships llama3 scaling as one divisor a frequency."""
    from dataclasses import replace

    scaled = load_config(resolve(str(make_tiny_model(tmp_path / "hf"))))
    plain = replace(scaled, rope_scaling=None)
    position = 1
    angles = [torch.acos(rope_table(c)[position, : c.head_dim // 2]) for c in (plain, scaled)]
    factors = tuple((angles[0] / angles[1]).tolist())
    assert max(factors) > 4
    again = replace(scaled, rope_scaling={"rope_type": "factors", "factors": factors})
    assert torch.allclose(rope_table(again)[:64], rope_table(scaled)[:64], atol=1e-2)


def test_newer_rope_parameters_mean_the_same(copy: Path, tiny_model: Path) -> None:
    old = json.loads((copy / "config.json").read_text())
    parameters = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    edit_config(copy, rope_scaling=None, rope_theta=None, rope_parameters=parameters)
    assert torch.equal(logits(resolve(str(copy))), logits(resolve(str(tiny_model))))


def test_bfloat16_weights_compute_in_float32_on_a_cpu(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "bf16", dtype=torch.bfloat16)
    runner = ModelRunner(resolve(str(folder)), num_blocks=4, device="cpu")
    assert runner.dtype == torch.float32
    wide = make_tiny_model(tmp_path / "fp32")
    difference = logits(resolve(str(folder))) - logits(resolve(str(wide)))
    assert 0 < difference.abs().max() < 1.0


def test_half_precision_takes_the_operators_of_a_gpu(tiny_model: Path) -> None:
    exact = logits(resolve(str(tiny_model)))
    for dtype in ("bfloat16", "float16"):
        rough = logits(resolve(str(tiny_model)), dtype=dtype)
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).abs().max() < (0.5 if dtype == "bfloat16" else 0.06)


# -- broken models ---------------------------------------------------------------------------


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        logits(resolve(str(folder)))
    for word in (str(folder), *words):
        assert word in str(caught.value)


def resolve_refuses(path: Path, *words: str) -> None:
    """Before anything is started."""
    with pytest.raises(ModelError) as caught:
        resolve(str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


def rewrite(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)


def test_missing_tensor(copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, lambda tensors: tensors.pop(name))
    refused(copy, name, "missing")


def test_wrong_shape(copy: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({name: torch.zeros(16, 64)}))
    refused(copy, name, "[16, 64]", "[32, 64]")


def test_tensors_that_nobody_would_read_are_named(copy: Path) -> None:
    """Biases and scales that are left out make garbage of what is read."""
    for name in ("self_attn.q_proj.bias", "mlp.up_proj.weight_scale", "mlp.up_proj.qweight"):
        name = f"model.layers.1.{name}"
        rewrite(copy, lambda tensors, name=name: tensors.update({name: torch.zeros(64)}))
        resolve_refuses(copy, name, "not supported")
        rewrite(copy, lambda tensors, name=name: tensors.pop(name))
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"  # Llama 2 shipped what it computed
    rewrite(copy, lambda tensors: tensors.update({inverse: torch.zeros(8)}))
    resolve(str(copy))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32])
def test_weights_of_a_dtype_that_is_not_read(copy: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    resolve_refuses(copy, name, "dtype", "not supported")


def test_packed_weights_are_named(copy: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        packed = tensors.pop(name).to(torch.int32)[:, ::8].contiguous()
        tensors[name.replace("weight", "qweight")] = packed

    rewrite(copy, pack)
    resolve_refuses(copy, name.replace("weight", "qweight"), "I32")


@pytest.mark.parametrize(
    ("field", "how", "method"),
    [
        ("quantization_config", {"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("compression_config", {"format": "pack-quantized"}, "pack-quantized"),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(
    copy: Path, field: str, how: dict, method: str
) -> None:
    edit_config(copy, **{field: how})
    resolve_refuses(copy, "config.json", field, method)


def test_gguf_biases_are_loaded_where_the_model_has_them_and_else_refused(tmp_path: Path) -> None:
    """Qwen2's: test_gguf_equals_safetensors. A Llama's would be left out."""
    folder = make_tiny_model(tmp_path / "hf", "llama")
    edit_config(folder, rope_scaling=None)
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(32)}))
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, gguf.GGMLQuantizationType.F32)
    resolve_refuses(path, "blk.1.attn_k.bias", "not supported")


def test_gguf_biases_count(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "hf", "qwen2")
    files = {}
    for name, factor in (("with", 1.0), ("without", 0.0)):

        def scale(tensors: dict[str, torch.Tensor], factor: float = factor) -> None:
            tensors.update({n: t * factor for n, t in tensors.items() if n.endswith(".bias")})

        rewrite(folder, scale)
        path = tmp_path / f"{name}.gguf"
        write_gguf(folder, path, gguf.GGMLQuantizationType.F32)
        files[name] = resolve(str(path))
    assert (logits(files["with"]) - logits(files["without"])).abs().max() > 0.1


def test_a_gguf_type_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    folder = make_tiny_model(tmp_path / "hf", "qwen2")
    write_gguf(folder, path, gguf.GGMLQuantizationType.F32, odd={"model.norm.weight": np.int32})
    resolve_refuses(path, "output_norm.weight", "I32")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(copy, "model.safetensors")


def test_truncated_after_it_was_resolved(copy: Path) -> None:
    files = resolve(str(copy))
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or corrupt"):
        logits(files)


def test_missing_shard(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "sharded", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_broken_index(tmp_path: Path, index: str) -> None:
    folder = make_tiny_model(tmp_path / "sharded", shards=2)
    files = resolve(str(folder))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        load_weights(files, load_config(files))


@pytest.mark.parametrize("factor", [1, 2])
def test_a_tensor_is_read_where_the_index_has_it(tmp_path: Path, factor: int) -> None:
    """Another shard may still hold what was replaced, also in another shape."""
    folder = make_tiny_model(tmp_path / "sharded", shards=2)
    index, (first, last) = folder / INDEX, sorted(folder.glob("*.safetensors"))
    name, right = next((n, t) for n, t in sorted(load_file(first).items()) if t.dim() == 1)
    save_file(load_file(last) | {name: torch.full((factor * len(right),), 7.0)}, last)
    files = resolve(str(folder))
    out = torch.empty(len(right))
    load_weights(files, load_config(files)).read(name, out)
    assert torch.equal(out, right)
    index.write_text(index.read_text() + " ")
    assert resolve(str(folder)).digest != files.digest  # of what says which tensors are read


@pytest.mark.parametrize("keep", [10, 200, 5000, -1])
def test_truncated_gguf(tmp_path: Path, keep: int) -> None:
    folder = make_tiny_model(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, gguf.GGMLQuantizationType.Q8_0)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "truncated" if keep != 10 else "GGUF")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "mamba", "not supported")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ("model_type", "gpt2")),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"num_hidden_layers": "two"}, ("num_hidden_layers", "two")),
        ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
        ({"num_attention_heads": 0}, ("num_heads",)),
        ({"num_key_value_heads": 3}, ("3 KV heads",)),
        ({"vocab_size": 4000}, ("embed_tokens", "[4000, 64]")),
        ({"hidden_act": "gelu"}, ("hidden_act",)),
        ({"mlp_bias": True}, ("mlp_bias",)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ("yarn",)),
        ({"rope_scaling": {"rope_type": "llama3"}}, ("rope_scaling",)),
        ({"rope_scaling": 7}, ("rope_scaling",)),
    ],
)
def test_config_that_cannot_be(copy: Path, changes: dict, words: tuple[str, ...]) -> None:
    edit_config(copy, **changes)
    refused(copy, *words)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_config_that_is_no_json(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    refused(copy, "config.json")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"device": "toaster"}, "device"),
        ({"block_size": 24}, "block_size"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_settings_that_cannot_be(tiny_model: Path, options: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelRunner(resolve(str(tiny_model)), **({"num_blocks": 4, "device": "cpu"} | options))
