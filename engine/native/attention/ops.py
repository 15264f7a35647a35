"""What a model needs besides matrix products, for one step over the paged pool.

Two rooms implement it: torch_ops (any device) and numba_ops (float32 on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from crossdock.engine.native.batch import Batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.engine.native.rope import rope_table
from crossdock.model.config import ModelConfig


class StepOps(Protocol):
    """Bound to one batch and one pool. T rows, of which N are sampled."""

    token_ids: torch.Tensor  # [T] on the model's device
    sampled: torch.Tensor  # [N] rows, on the model's device

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension."""

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        """Normalizes (where weights are given) and rotates the queries of qkv
        [T, (heads + 2 kv_heads) * head_dim] in place; writes keys, so treated, and values into
        the pool."""

    def attend(self, layer: int, qkv: torch.Tensor, only_sampled: bool) -> torch.Tensor:
        """Causal attention over the pool after `store` → [T or N, heads * head_dim]."""

    def finite(self) -> torch.Tensor:
        """After the last `store`: bool [T], whether all KV written for a row is finite."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [rows, 2 * intermediate] → [rows, intermediate]."""


def make_ops(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
) -> Callable[[Batch, KVCache], StepOps]:
    """What makes the operations of each step, for one model on one device: compiled kernels where
    they fit (CPU, float32), else those of torch.

    `kv_dtype`: of the pool; where it is not `dtype`, attention converts what it reads."""
    if kv_dtype in (None, dtype) and _numba_fits(config, dtype, device):
        from crossdock.engine.native.attention.numba_ops import NumbaStep

        return partial(NumbaStep, config, rope_table(config).numpy())
    from crossdock.engine.native.attention.torch_ops import TorchStep

    return partial(TorchStep, config, rope_table(config, device))


def _numba_fits(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and config.head_dim % 16 == 0
