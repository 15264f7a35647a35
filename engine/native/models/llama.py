"""The Llama family's forward pass: Llama, Mistral, Qwen2, Qwen3 (see FAMILIES in weights/config).

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from crossdock.engine.native.attention.ops import StepOps
from crossdock.engine.native.batch import Batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.engine.native.linear import Linear, make_linear
from crossdock.engine.native.weights.load import Weights
from crossdock.model.config import ModelConfig
from crossdock.model.tensors import tensor_shapes


@dataclass(frozen=True)
class Layer:
    input_norm: torch.Tensor
    qkv: Linear  # fused: queries, keys, values
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear  # fused: gate, up
    down: Linear


@dataclass(frozen=True)
class Forward:
    """What a step computed, of T rows."""

    logits: torch.Tensor  # float32 [N, vocab] of the sampled rows
    scored: torch.Tensor  # [M, hidden] last hidden states of the scored rows
    finite: torch.Tensor  # bool [T], whether the KV of each row is


class LlamaModel:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        step_ops: Callable[[Batch, KVCache], StepOps],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self._step_ops = config, step_ops
        read = _Reader(config, weights, dtype, device)
        self._embedding = read.tensor("model.embed_tokens.weight")
        self._layers = [read.layer(index) for index in range(config.num_layers)]
        self._norm = read.tensor("model.norm.weight")
        if config.tie_word_embeddings:
            self._head = make_linear(self._embedding)
        else:
            self._head = make_linear(read.tensor("lm_head.weight"))

    def forward(self, batch: Batch, kv: KVCache) -> Forward:
        """Writes the KV of all rows, and computes what is wanted of the sampled and scored ones."""
        step = self._step_ops(batch, kv)
        hidden = functional.embedding(step.token_ids, self._embedding)
        count = len(batch.sampled)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(step.norm(hidden, layer.input_norm))
            step.store(index, qkv, layer.q_norm, layer.k_norm)
            last = index == len(self._layers) - 1
            # Of the other rows the last layer needs no more than keys and values.
            only_sampled = last and count < batch.num_rows and not len(batch.scored)
            if only_sampled:
                if not count:
                    return Forward(self.logits(hidden[:0]), hidden[:0], step.finite())
                hidden = hidden[step.sampled]
            attended = step.attend(index, qkv, only_sampled)
            if last and len(batch.scored):
                # Scored rows are many and neighbours: cheaper attended to as whole chunks.
                scored = torch.from_numpy(batch.scored).to(hidden.device)
                rows = torch.cat((step.sampled, scored))
                attended, hidden = attended[rows], hidden[rows]
            hidden = layer.output.add_to(attended, hidden)
            gate_up = layer.gate_up(step.norm(hidden, layer.post_norm))
            hidden = layer.down.add_to(step.swiglu(gate_up), hidden)
        hidden = step.norm(hidden, self._norm)
        return Forward(self.logits(hidden[:count]), hidden[count:], step.finite())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab] of the last hidden states [rows, hidden]."""
        if not len(hidden):
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return self._head(hidden).float()


class _Reader:
    """Asks for each tensor by name, and reads those that are used together into one."""

    def __init__(
        self, config: ModelConfig, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config, self._weights, self._dtype, self._device = config, weights, dtype, device
        self._shapes = tensor_shapes(config)

    def tensor(self, *names: str) -> torch.Tensor:
        """The rows of all of them, one after the other."""
        shapes = [self._shapes[name] for name in names]
        rows = [shape[0] for shape in shapes]
        out = torch.empty((sum(rows), *shapes[0][1:]), dtype=self._dtype)
        for name, part in zip(names, out.split(rows)):
            self._weights.read(name, part)
        return out.to(self._device)

    def layer(self, index: int) -> Layer:
        config, at = self._config, f"model.layers.{index}."
        attention, mlp = at + "self_attn.", at + "mlp."
        qkv = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
        q_norm = k_norm = qkv_bias = None
        if config.qkv_bias:
            qkv_bias = self.tensor(*(name + ".bias" for name in qkv))
        if config.qk_norm:
            q_norm = self.tensor(attention + "q_norm.weight")
            k_norm = self.tensor(attention + "k_norm.weight")
        return Layer(
            input_norm=self.tensor(at + "input_layernorm.weight"),
            qkv=make_linear(self.tensor(*(name + ".weight" for name in qkv)), qkv_bias),
            q_norm=q_norm,
            k_norm=k_norm,
            output=make_linear(self.tensor(attention + "o_proj.weight")),
            post_norm=self.tensor(at + "post_attention_layernorm.weight"),
            gate_up=make_linear(self.tensor(mlp + "gate_proj.weight", mlp + "up_proj.weight")),
            down=make_linear(self.tensor(mlp + "down_proj.weight")),
        )
