"""The default model, as shipped in GGUF, against transformers' own reading of the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from offline import LLM

from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.gguf_file import gguf_name
from crossdock.proto.types import FinishReason, SamplingParams

pytestmark = pytest.mark.slow

TEXT = """The river port had two docks. At the first, trucks from the mountains arrived all night,
and their freight was weighed, named and stacked. At the second, small boats waited. Nothing was
ever stored for long: what came in at one side went out at the other, 24 hours a day. def f(x):
return x ** 2 + 1  # Größe, 速度, 🙂 """


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(str(smollm2), num_blocks=128, device="cpu", threads=1)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> torch.nn.Module:
    """transformers' Llama with the file's weights as the gguf package dequantizes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(smollm2)
    heads = {"attn_q": 9, "attn_k": 3}
    state = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            pairs = values.reshape(heads[part], 32, 2, 576)
            values = np.concatenate((pairs[:, :, 0], pairs[:, :, 1]), axis=1).reshape(-1, 576)
        state[tensor.name] = torch.from_numpy(np.array(values, order="C"))
    model_config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(model_config)
    tied = {"lm_head.weight"}
    renamed = {name: state[gguf_name(name)] for name in model.state_dict() if name not in tied}
    result = model.load_state_dict(renamed, strict=False)
    assert set(result.missing_keys) <= tied
    model.tie_weights()
    return model.eval()


def test_teacher_forced_logits(llm: LLM, reference: torch.nn.Module) -> None:
    ids = llm.text.encode(TEXT * 4)
    sequence = Sequence("s", ids, len(ids), SamplingParams(), block_table=list(range(90, 2, -1)))
    parts, start = [], 0
    for length in (150, 1, 37, 2, 1, len(ids) - 191):
        plan = StepPlan((Chunk(sequence, start, length, True),))
        parts.append(llm.runner.logits(plan, every_token=True))
        start += length
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids])).logits[0]
    assert len(ids) > 300
    assert (torch.cat(parts) - theirs).abs().max() <= 1e-3


def test_greedy_continuations(llm: LLM, reference: torch.nn.Module) -> None:
    """Prompts of very unlike lengths, decoded together; only ties within 1e-3 may differ."""
    prompts = [llm.text.encode((TEXT * 2)[: 9 * 3**n]) for n in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True):
        ids = prompt + result.token_ids
        with torch.inference_mode():
            theirs = reference(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        drawn = theirs.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        assert (theirs.max(dim=1).values - drawn).max() <= 1e-3
    llm.pool.check_integrity()


def test_knows_the_capital_of_france(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32)
    [answer] = llm.generate(["What is the capital of France?"], params, chat=True)
    assert "Paris" in answer.text
    assert answer.finish_reason == FinishReason.STOP
