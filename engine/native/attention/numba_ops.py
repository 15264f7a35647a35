"""The step's small operators as numba kernels: float32 on a CPU."""

from __future__ import annotations

import numpy as np
import torch

from crossdock.engine.native.attention import numba_kernels as kernels
from crossdock.engine.native.batch import Batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.model.config import ModelConfig

NO_NORM = np.empty(0, dtype=np.float32)
SHORT_CHUNK = 4  # tokens up to which a chunk's rows are cheaper one by one, without a gather


class NumbaStep:
    """See StepOps, for a CPU in float32; `rope` is as rope_table gives it."""

    def __init__(self, config: ModelConfig, rope: np.ndarray, batch: Batch, kv: KVCache) -> None:
        self._config, self._rope, self._batch, self._kv = config, rope, batch, kv
        self._eps = np.float32(config.rms_norm_eps)
        self.token_ids = torch.from_numpy(batch.token_ids)
        self.sampled = torch.from_numpy(batch.sampled)
        self._pool = kv.data.view(-1).numpy()
        self._rope_and_store = kernels.rope_and_store(config.head_dim)
        self._attention = kernels.paged_attention(
            config.head_dim, config.num_heads // config.num_kv_heads, kv.block_size
        )
        width = batch.block_tables.shape[1] * kv.block_size
        self._sums = np.zeros(batch.num_rows, dtype=np.float32)
        self._scores = np.empty((config.num_heads, width), dtype=np.float32)
        long = batch.chunk_length > SHORT_CHUNK
        self._single = np.flatnonzero(~long[batch.chunk_of_row])
        self._long = [_LongChunk(batch, int(chunk)) for chunk in np.flatnonzero(long)]
        if self._long:
            self._prepare_long(width)

    def _prepare_long(self, width: int) -> None:
        """Scratch that the long chunks of the step use in turn."""
        config, kv = self._config, self._kv
        self._gather = kernels.gather_context(config.head_dim, kv.block_size)
        self._chunk_attention = kernels.chunk_attention(
            config.head_dim, config.num_heads // config.num_kv_heads
        )
        tiles = -(-width // kernels.TILE)
        shape = (2, config.num_kv_heads, tiles, kernels.TILE * config.head_dim)
        self._context = tuple(np.empty(shape, dtype=np.float32))
        rows = max(chunk.rows.stop - chunk.rows.start for chunk in self._long)
        self._running = tuple(np.empty((2, rows + rows % 2), dtype=np.float32))

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        kernels.rms_norm(hidden.numpy(), weight.numpy(), self._eps, out.numpy())
        return out

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        config, batch = self._config, self._batch
        self._rope_and_store(
            qkv.numpy(),
            self._rope,
            batch.positions,
            batch.blocks,
            batch.offsets,
            NO_NORM if q_norm is None else q_norm.numpy(),
            NO_NORM if k_norm is None else k_norm.numpy(),
            self._eps,
            self._pool,
            (config.num_layers, layer, config.num_kv_heads, self._kv.block_size),
            self._sums,
        )

    def finite(self) -> torch.Tensor:
        return torch.from_numpy(np.isfinite(self._sums))

    def attend(self, layer: int, qkv: torch.Tensor, only_sampled: bool) -> torch.Tensor:
        if only_sampled:
            return self._attend_rows(layer, qkv, self._batch.sampled)
        if not self._long:
            return self._attend_rows(layer, qkv, self._single)
        out = torch.empty((len(qkv), self._config.query_size))
        if len(self._single):
            out[self._single] = self._attend_rows(layer, qkv, self._single)
        for chunk in self._long:
            self._attend_chunk(layer, qkv[chunk.rows], chunk, out[chunk.rows])
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

    def _attend_chunk(
        self, layer: int, qkv: torch.Tensor, chunk: _LongChunk, out: torch.Tensor
    ) -> None:
        config, window = self._config, self._config.window(layer)
        first = max(0, chunk.start + 1 - window) // kernels.TILE if window else 0
        layout = (config.num_layers, layer, config.num_kv_heads)
        table = self._batch.block_tables[chunk.index]
        self._gather(table, first, chunk.end, self._pool, layout, *self._context)
        self._chunk_attention(
            qkv.numpy(), chunk.start, window, *self._context, *self._running, out.numpy()
        )


class _LongChunk:
    def __init__(self, batch: Batch, index: int) -> None:
        first_row, length = int(batch.chunk_start[index]), int(batch.chunk_length[index])
        self.index, self.rows = index, slice(first_row, first_row + length)
        self.start = int(batch.positions[first_row])
        self.end = self.start + length
