"""The step's small operators as numba kernels: float32 on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from crossdock.engine.attention import numba_kernels as kernels
from crossdock.engine.batch import Batch
from crossdock.engine.kv_cache import KVCache
from crossdock.engine.rope import rope_table
from crossdock.engine.weights.config import ModelConfig

NO_NORM = np.empty(0, dtype=np.float32)
SHORT_CHUNK = 8  # tokens up to which a chunk's rows are cheaper one by one, without a gather


class NumbaOps:
    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.rope = rope_table(config).numpy()
        self.eps = np.float32(config.rms_norm_eps)
        self.rope_and_store = kernels.rope_and_store(config.head_dim)

    def step(self, batch: Batch, kv: KVCache) -> NumbaStep:
        return NumbaStep(self, batch, kv)


class NumbaStep:
    def __init__(self, ops: NumbaOps, batch: Batch, kv: KVCache) -> None:
        config = ops.config
        self._ops, self._config, self._batch, self._kv = ops, config, batch, kv
        self.token_ids = torch.from_numpy(batch.token_ids)
        self.sampled = torch.from_numpy(batch.sampled)
        self._pool = kv.data.view(-1).numpy()
        self._attention = kernels.paged_attention(
            config.head_dim, config.num_heads // config.num_kv_heads, kv.block_size
        )
        width = batch.block_tables.shape[1] * kv.block_size
        self._scores = np.empty((config.num_heads, width), dtype=np.float32)
        long = batch.chunk_length > SHORT_CHUNK
        self._single = np.flatnonzero(~long[batch.chunk_of_row])
        self._long = [_LongChunk(batch, kv, int(chunk)) for chunk in np.flatnonzero(long)]

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        kernels.rms_norm(hidden.numpy(), weight.numpy(), self._ops.eps, out.numpy())
        return out

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        config, batch = self._config, self._batch
        self._ops.rope_and_store(
            qkv.numpy(),
            self._ops.rope,
            batch.positions,
            batch.blocks,
            batch.offsets,
            NO_NORM if q_norm is None else q_norm.numpy(),
            NO_NORM if k_norm is None else k_norm.numpy(),
            self._ops.eps,
            self._pool,
            (config.num_layers, layer, config.num_kv_heads, self._kv.block_size),
        )

    def attend(self, layer: int, qkv: torch.Tensor, only_sampled: bool) -> torch.Tensor:
        if only_sampled:
            return self._attend_rows(layer, qkv, self._batch.sampled)
        if not self._long:
            return self._attend_rows(layer, qkv, self._single)
        out = torch.empty((len(qkv), self._config.query_size))
        if len(self._single):
            out[self._single] = self._attend_rows(layer, qkv, self._single)
        for chunk in self._long:
            out[chunk.rows] = self._attend_chunk(layer, qkv[chunk.rows], chunk)
        return out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(gate_up), gate_up.shape[1] // 2))
        kernels.swiglu(gate_up.numpy(), out.numpy())
        return out

    def _attend_rows(self, layer: int, qkv: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        config, batch = self._config, self._batch
        out = torch.empty((len(rows), config.query_size))
        self._attention(
            qkv.numpy(),
            rows,
            batch.positions,
            batch.chunk_of_row,
            batch.block_tables,
            config.window(layer),
            self._pool,
            (config.num_layers, layer, config.num_kv_heads),
            self._scores,
            out.numpy(),
        )
        return out

    def _attend_chunk(self, layer: int, qkv: torch.Tensor, chunk: _LongChunk) -> torch.Tensor:
        """Gathers the context once and runs SDPA → [chunk rows, heads * head_dim]."""
        config = self._config
        kv_heads, head_dim = config.num_kv_heads, config.head_dim
        keys_values = self._kv.data[:, layer].index_select(0, chunk.blocks)
        context = keys_values.permute(1, 2, 0, 3, 4).reshape(2, 1, kv_heads, -1, head_dim)
        queries = qkv[:, : config.query_size].view(-1, config.num_heads, head_dim)
        out = functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            context[0, :, :, : chunk.context],
            context[1, :, :, : chunk.context],
            attn_mask=chunk.mask(config.window(layer)),
            is_causal=chunk.mask(config.window(layer)) is None,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1).reshape(len(qkv), -1)


class _LongChunk:
    def __init__(self, batch: Batch, kv: KVCache, chunk: int) -> None:
        start, self.length = int(batch.chunk_start[chunk]), int(batch.chunk_length[chunk])
        self.rows = slice(start, start + self.length)
        self.context = batch.last_position(chunk) + 1
        blocks = -(-self.context // kv.block_size)
        self.blocks = torch.from_numpy(batch.block_tables[chunk, :blocks].astype(np.int64))
        self._masks: dict[int, torch.Tensor | None] = {}

    def mask(self, window: int) -> torch.Tensor | None:
        """float32 [length, context] to add to the scores; None where plain causal says it all."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int) -> torch.Tensor | None:
        if self.length == self.context and not window:
            return None
        positions = torch.arange(self.context - self.length, self.context)[:, None]
        ages = positions - torch.arange(self.context)
        hidden = (ages < 0) | (ages >= window) if window else ages < 0
        return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
