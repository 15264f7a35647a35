"""The step's small operators in plain torch: for GPUs, and what numba_ops does not take."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from crossdock.engine.native.batch import Batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.model.config import ModelConfig

_KV = tuple[torch.Tensor, torch.Tensor]


class TorchStep:
    """See StepOps, for any device and type; `rope` is as rope_table gives it, on that device.

    Attention gathers the context of each sequence and runs SDPA: single rows (decode) in one
    padded batch, longer chunks one by one."""

    def __init__(self, config: ModelConfig, rope: torch.Tensor, batch: Batch, kv: KVCache) -> None:
        self._config, self._device, self._batch, self._kv = config, rope.device, batch, kv
        self.token_ids = self._tensor(batch.token_ids)
        self.sampled = self._tensor(batch.sampled)
        self._cos, self._sin = rope[self._tensor(batch.positions)].unsqueeze(1).chunk(2, -1)
        self._blocks, self._offsets = self._tensor(batch.blocks), self._tensor(batch.offsets)
        self._tables = self._tensor(batch.block_tables.astype(np.int64))
        single = batch.chunk_start[batch.chunk_length == 1]
        self._long: list[int] = np.flatnonzero(batch.chunk_length > 1).tolist()
        self._single_rows = _Rows(self, single)
        self._sampled_rows = _Rows(self, batch.sampled)

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        return weight * wide.to(hidden.dtype)

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        queries, keys, values = self._split(qkv)
        if q_norm is not None and k_norm is not None:
            queries.copy_(self.norm(queries, q_norm))
            keys.copy_(self.norm(keys, k_norm))
        queries.copy_(self._rotated(queries))
        pool = self._kv.data
        pool[self._blocks, layer, 0, :, self._offsets] = self._rotated(keys).to(pool.dtype)
        pool[self._blocks, layer, 1, :, self._offsets] = values.to(pool.dtype)

    def attend(self, layer: int, qkv: torch.Tensor, only_sampled: bool) -> torch.Tensor:
        queries = self._split(qkv)[0]
        if only_sampled:
            return self._attend_rows(layer, queries, self._sampled_rows).flatten(1)
        out = torch.empty_like(queries)
        if len(self._single_rows.rows):
            rows = self._single_rows
            out[rows.rows] = self._attend_rows(layer, queries, rows)
        for chunk in self._long:
            start = self._batch.chunk_start[chunk]
            end = start + self._batch.chunk_length[chunk]
            out[start:end] = self._attend_chunk(layer, queries[start:end], chunk)
        return out.flatten(1)

    def finite(self) -> torch.Tensor:
        written = self._kv.data[self._blocks, :, :, :, self._offsets]
        return written.flatten(1).sum(1, dtype=torch.float32).isfinite()

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def _attend_rows(self, layer: int, queries: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """Each row against its own context, padded to the longest → [rows, heads, head_dim]."""
        keys, values = self._gather(layer, rows.tables, queries.dtype, rows)
        return functional.scaled_dot_product_attention(
            queries[rows.rows].unsqueeze(2),
            keys,
            values,
            attn_mask=rows.mask(self._config.window(layer)),
            enable_gqa=True,
        ).squeeze(2)

    def _attend_chunk(self, layer: int, queries: torch.Tensor, chunk: int) -> torch.Tensor:
        length, start = len(queries), self._batch.chunk_start[chunk]
        context = int(self._batch.positions[start]) + length
        window = self._config.window(layer)
        blocks = -(-context // self._kv.block_size)
        tables = self._tables[chunk : chunk + 1, :blocks]
        keys, values = self._gather(layer, tables, queries.dtype)
        mask = None
        if length < context or window:
            mask = _causal_mask(length, context, window, self._device)
        out = functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys[:, :, :context],
            values[:, :, :context],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1)

    def _gather(
        self, layer: int, tables: torch.Tensor, dtype: torch.dtype, rows: _Rows | None = None
    ) -> _KV:
        """K and V [sequences, kv_heads, context, head_dim] of tables [sequences, blocks]; of
        `rows`, with zeros for what is stale."""
        blocks = self._kv.data[:, layer][tables].to(dtype)
        if rows is not None and len(rows.stale):
            blocks[rows.partial] = blocks[rows.partial].masked_fill(rows.stale, 0.0)
        return tuple(blocks.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).unbind(0))  # type: ignore

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        per_head = qkv.view(len(qkv), -1, self._config.head_dim)
        return per_head.split((heads, kv_heads, kv_heads), dim=1)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = self._cos, self._sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class _Rows:
    """Rows that attend each for itself: their block tables, and which of that context they see.

    partial: blocks (row, place in its table) that reach beyond the row's chunk; stale: what of
    them does, bool [partial, 1, 1, block_size, 1]. It may be NaN, and 0 times that is no 0.
    """

    def __init__(self, step: TorchStep, rows: np.ndarray) -> None:
        batch, block_size = step._batch, step._kv.block_size
        self.rows = step._tensor(rows)
        if not len(rows):
            return
        positions = batch.positions[rows]
        blocks = int(positions.max()) // block_size + 1
        tables = batch.block_tables[batch.chunk_of_row[rows], :blocks].astype(np.int64)
        self.tables = step._tensor(tables)
        last = (batch.chunk_start + batch.chunk_length - 1)[batch.chunk_of_row[rows]]
        places = np.arange(blocks * block_size).reshape(blocks, block_size)
        stale = places > batch.positions[last][:, None, None]
        partial = stale.any(-1).nonzero()
        self.partial = tuple(step._tensor(indices) for indices in partial)
        self.stale = step._tensor(stale[partial])[:, None, None, :, None]
        self._ages = step._tensor(positions)[:, None] - torch.arange(
            blocks * block_size, device=step._device
        )

    def mask(self, window: int) -> torch.Tensor:
        """bool [rows, 1, 1, context]"""
        return _seen(self._ages, window)[:, None, None, :]


def _causal_mask(length: int, context: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, context]: the last `length` positions of a context, each seeing its past."""
    positions = torch.arange(context - length, context, device=device)[:, None]
    return _seen(positions - torch.arange(context, device=device), window)


def _seen(ages: torch.Tensor, window: int) -> torch.Tensor:
    return (ages >= 0) & (ages < window) if window else ages >= 0
