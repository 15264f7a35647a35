"""A model written as a Hugging Face folder: ours again, and what transformers makes of it."""

from __future__ import annotations

import errno
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from offline import LLM
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model, write_gguf

from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model import export
from crossdock.model.config import FAMILIES, load_config
from crossdock.model.export import export_model
from crossdock.model.store import NOWHERE, resolve
from crossdock.model.text import load_text
from crossdock.model.tokenizer_parts import TokenizerParts
from crossdock.proto.errors import ConfigError, ModelError
from crossdock.proto.types import SamplingParams

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MESSAGES = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris.\n"},
    {"role": "user", "content": "And of Italy? 🙂 <|im_end|>"},
]


def make_gguf(
    folder: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    **options: object,
) -> Path:
    """Beside the folder that it is made of, whose llama3 scaling is that of Llama 3.2."""
    make_tiny_model(folder, architecture, **options)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if architecture == "llama":
        config |= {"rope_theta": 500_000.0, "rope_scaling": LLAMA3}
    path.write_text(json.dumps(config))
    write_gguf(folder, folder.with_suffix(".gguf"), kind)
    return folder.with_suffix(".gguf")


def exported(source: Path, folder: Path, dtype: str = "auto", **options: bool) -> Path:
    return export_model(str(source), folder, NOWHERE, dtype, **options)


def all_logits(llm: LLM, ids: list[int]) -> torch.Tensor:
    blocks = list(range(len(ids) // 16 + 1))
    sequence = Sequence("s", ids, len(ids), SamplingParams(), block_table=blocks)
    plan = StepPlan((Chunk(sequence, 0, len(ids), True),))
    return llm.runner.logits(plan, every_token=True)


def tiny_llm(model: Path) -> LLM:
    return LLM(str(model), num_blocks=16, device="cpu", threads=1)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_gguf_and_its_folder_are_one_model(tmp_path: Path, architecture: str, kind: str) -> None:
    window = {} if architecture == "llama" else {"sliding_window": 24}
    source = make_gguf(tmp_path / "hf", architecture, GGMLQuantizationType[kind], **window)
    folder = exported(source, tmp_path / "out", "float32")
    ours, theirs = (resolve(str(path)) for path in (source, folder))
    before, after = load_config(ours), load_config(theirs)
    assert after == replace(before, dtype="float32", rope_scaling=after.rope_scaling)
    assert after.rope_scaling == (LLAMA3 if architecture == "llama" else None)
    text, again = load_text(ours), load_text(theirs)
    assert text.apply_chat_template(MESSAGES) == again.apply_chat_template(MESSAGES)
    ids = text.encode("Grüße <|im_end|> print(add(2, 3))\n" * 2)
    assert again.encode("Grüße <|im_end|> print(add(2, 3))\n" * 2) == ids
    difference = all_logits(tiny_llm(source), ids) - all_logits(tiny_llm(folder), ids)
    assert difference.abs().max() <= (1e-5 if architecture == "llama" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_of_every_family_equal_transformers(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    window = {} if architecture == "llama" else {"sliding_window": 24}
    source = make_gguf(tmp_path / "hf", architecture, GGMLQuantizationType.Q8_0, **window)
    folder = exported(source, tmp_path / "out", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    ids = [random.Random(0).randrange(300) for _ in range(90)]
    with torch.inference_mode():
        theirs = model.eval()(torch.tensor([ids])).logits[0]
    assert (all_logits(tiny_llm(source), ids) - theirs).abs().max() <= 1e-3


def test_values_are_rounded_as_torch_does(tmp_path: Path) -> None:
    source = make_gguf(tmp_path / "hf")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found = load_file(exported(source, tmp_path / name, name) / "model.safetensors")
        assert found.keys() == wanted.keys()
        for tensor, values in found.items():
            assert values.dtype == dtype
            assert torch.equal(values, wanted[tensor].to(dtype)), tensor
    halfway = torch.arange(0x3F80_0000, 0x3F84_0000, 0x4000, dtype=torch.int32)
    values = torch.cat((halfway, halfway + 1, halfway - 1)).view(torch.float32)
    bits = export.DTYPES["bfloat16"].of(values.numpy()).view(np.int16)
    assert torch.equal(torch.from_numpy(bits), values.bfloat16().view(torch.int16))


def test_the_models_own_type_is_the_default(tmp_path: Path) -> None:
    folder = exported(make_gguf(tmp_path / "hf", "qwen3"), tmp_path / "out")
    assert load_config(resolve(str(folder))).dtype == "float16"
    tensors = load_file(folder / "model.safetensors")
    assert {values.dtype for values in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors  # it is the embedding
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "hf", "mistral", sliding_window=24) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    write_gguf(path.parent, tmp_path / "hf.gguf", GGMLQuantizationType.F32)
    folder = exported(tmp_path / "hf.gguf", tmp_path / "out")
    config = load_config(resolve(str(folder)))
    assert (config.architecture, config.sliding_window) == ("mistral", 24)


def test_all_templates_and_all_ends_of_an_answer_are_told(tmp_path: Path) -> None:
    config = load_config(resolve(str(make_tiny_model(tmp_path / "hf"))))
    tokenizer = load_text(resolve(str(tmp_path / "hf"))).tokenizer
    parts = TokenizerParts(tokenizer, {"default": "D", "tool_use": "T"}, {"unk_token": "a"})
    told = export._tokenizer_config(config, parts)["chat_template"]
    assert {each["name"]: each["template"] for each in told} == parts.template
    bare = replace(parts, template={})
    assert "chat_template" not in export._tokenizer_config(config, bare)
    assert export._token_ids(replace(config, eos_token_ids=(2, 1)), bare) == {
        "eos_token_id": [2, 1]
    }


# -- what cannot be written ------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(kind: type[Exception], words: str, *arguments: object, **options: object) -> None:
    with pytest.raises(kind, match=words):
        exported(*arguments, **options)  # type: ignore[arg-type]


def test_divisors_that_are_not_llama_3s(tmp_path: Path) -> None:
    source = tmp_path / "odd.gguf"
    write_gguf(make_tiny_model(tmp_path / "hf"), source, GGMLQuantizationType.F32)
    before = left(tmp_path)
    refused(ModelError, r"odd\.gguf: tensor rope_freqs\.weight: ", source, tmp_path / "out")
    assert left(tmp_path) == before


def test_a_weight_beyond_the_type_leaves_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "hf", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"][3] = -70_000.0
    save_file(tensors, folder / "model.safetensors")
    source = tmp_path / "large.gguf"
    write_gguf(folder, source, GGMLQuantizationType.F32)
    before = left(tmp_path)
    words = r"layers\.1\.self_attn\.q_proj\.bias: 70000: F16 holds no more than 65504"
    refused(ModelError, words, source, tmp_path / "out")
    assert left(tmp_path) == before
    exported(source, tmp_path / "out", "bfloat16")


def test_what_fails_leaves_nothing_and_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_gguf(tmp_path / "hf")
    folder = exported(source, tmp_path / "out", "float32")
    before, config = left(tmp_path), (folder / "config.json").read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    refused(ModelError, "disk is full: 0 MB are free, 1 MB needed", source, folder, force=True)
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    for owner, name, fails, words in (
        (export, "_write_weights", full, "out: No space left on device"),
        (Path, "rename", busy, "out: Device or resource busy"),
    ):
        monkeypatch.setattr(owner, name, fails)
        refused(ModelError, words, source, folder, "float16", force=True)
        monkeypatch.undo()
    assert (left(tmp_path), (folder / "config.json").read_bytes()) == (before, config)


def test_the_target_is_new_or_empty_or_a_model_that_may_go(tmp_path: Path) -> None:
    source = make_gguf(tmp_path / "hf", "qwen2")
    folder, other = tmp_path / "deep" / "out", tmp_path / "other"
    exported(source, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(ModelError, "out is not empty; --force replaces", source, folder)
    assert left(exported(source, folder, "float32", force=True)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert left(folder.parent) == ["out"]
    other.mkdir()
    exported(source, other)
    (other / "config.json").unlink()
    refused(ModelError, "holds no config.json: --force", source, other, force=True)
    refused(ModelError, "hf.gguf is a file; it must be", source, source)
    refused(ModelError, "holds the model that is", folder, folder, force=True)
    inside = shutil.copy(source, folder)
    refused(ModelError, "holds the model that is", inside, folder, force=True)
    refused(ConfigError, "dtype: 'int4' must be one of auto, float32", source, other, "int4")
    with pytest.raises(ModelError, match="'simulated' has no weights"):
        export_model("simulated", tmp_path / "none", NOWHERE)


def test_a_folder_is_copied_with_what_belongs_to_it(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf", "qwen3", shards=3)
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("the same weights again")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    refused(ConfigError, "'float16' must be auto or float32", source, tmp_path / "x", "float16")
    folder = exported(source, tmp_path / "out")
    assert set(left(source)) - set(left(folder)) == {
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    }
    assert resolve(str(folder)).digest == resolve(str(source)).digest
    assert load_text(resolve(str(folder))).template.source == "{{ messages }}"


# -- the default model -----------------------------------------------------------------------

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about rivers.",
    "Count from 1 to 20.",
    "def fibonacci(n):",
    "Explain TCP in two sentences.",
    "Translate 'good morning' to Spanish.",
    "List three fruits.",
    "Who wrote Hamlet?",
    "Why is the sky blue?",
    "Grüße! 你好, what is 17 * 3?",
]
PIECES = [
    *("The capital of", " France", " is", "  ", "\n\n", "\t", "'ll", "3.14159", " 2026-11-21"),
    *(
        "Grüße",
        "žluťoučký",
        "你好，世界",
        "안녕",
        "привет",
        "שלום",
        "🙂",
        "👩‍👩‍👧",
        "e\u0301",
        "\u00a0",
    ),
    *("def f(x):\n    return x", "{'a': [1, 2]}", "<html>", "```python\n", "\\n", "\u0000", "//"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_sta", "<file_sep>"),
]


def texts(count: int) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("exported")
    return {dtype: exported(smollm2, home / dtype, dtype) for dtype in ("auto", "float32")}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_greedy_tokens_are_those_of_the_original(
    smollm2: Path, folders: dict[str, Path], dtype: str
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    before, after = (
        LLM(str(path), num_blocks=256, device="cpu", threads=1).generate(PROMPTS, params, chat=True)
        for path in (smollm2, folders[dtype])
    )
    assert [each.token_ids for each in before] == [each.token_ids for each in after]


def test_logits_equal_transformers(smollm2: Path, folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["float32"]).eval()
    llm = LLM(str(smollm2), num_blocks=64, device="cpu", threads=1)
    ids = llm.text.encode("".join(texts(12)))
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0]
    assert len(ids) > 200
    assert (all_logits(llm, ids) - theirs).abs().max() <= 1e-3


def test_text_is_that_of_the_original(smollm2: Path, folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders["auto"])
    ours, again = (load_text(resolve(str(path))) for path in (smollm2, folders["auto"]))
    for text in texts(200):
        assert ours.encode(text) == again.encode(text) == theirs(text).input_ids, text
    system = {"role": "system", "content": "Be brief."}
    for messages in (MESSAGES, [system, *MESSAGES]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.template.render(messages, prompt) == expected
            assert again.template.render(messages, prompt) == expected
