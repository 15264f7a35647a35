"""The tensors of vLLM's KV cache as a pool of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from crossdock.proto.errors import ConfigError, ModelError
from crossdock.proto.memory import Region


@dataclass(frozen=True)
class BlockShape:
    """What a block of this model is made of."""

    config: VllmConfig
    layout: KVCacheLayout
    groups: list[Any]  # vLLM's KV cache groups: one
    specs: dict[str, KVCacheSpec]  # by layer
    long_rope: bool  # which of two tables of factors turns its keys, which max_model_len decides

    @classmethod
    def of(cls, config: VllmConfig, executor: UniProcExecutor) -> BlockShape:
        """Raises ModelError for models whose state is not one kind of KV of all tokens, ConfigError
        for a block size that their attention does not take."""
        (specs,) = executor.get_kv_cache_specs()
        for name, spec in specs.items():
            if not isinstance(spec, AttentionSpec):
                kind = type(spec).__name__
                raise ModelError(f"{name} holds {kind}: not KV by block, which a hand-off moves")
        layout = _layout(config, executor, specs)
        groups = get_kv_cache_groups(config, specs)
        if len(groups) != 1:
            raise ModelError(f"the model has {len(groups)} kinds of KV blocks; 1 is supported")
        if groups[0].kv_cache_spec.block_size != (size := config.cache_config.block_size):
            message = f"{size} is no size of this model's blocks in vLLM"
            raise ConfigError("kv.block_size", f"{message}: {groups[0].kv_cache_spec.block_size}")
        modules = executor.driver_worker.worker.model_runner.model.modules()
        long_rope = any(getattr(module, "use_long_rope", False) for module in modules)
        return cls(config, layout, groups, specs, long_rope)

    @property
    def block_bytes(self) -> int:
        """Of one block, in all layers."""
        whole = self._cache_config(1 << 40)
        return int(whole.kv_cache_tensors[0].size // whole.num_blocks)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Layers with KV, and heads and elements a head of the first."""
        spec = next(iter(self.specs.values()))
        assert isinstance(spec, AttentionSpec)
        return len(self.specs), spec.num_kv_heads, spec.head_size

    @property
    def bytes_of(self) -> str:
        """Type and order of a block's bytes, and what else KV means by them: kernels read them as
        they write them, no others do."""
        spec = next(iter(self.specs.values()))
        assert isinstance(spec, AttentionSpec)
        backends = {
            (layer.get_attn_backend().get_name(), getattr(layer, "isa", ""))
            for layer in map(self.config.compilation_config.static_forward_context.get, self.specs)
        }
        kernels = " ".join(" ".join(filter(None, each)) for each in sorted(backends))
        parts = [str(spec.dtype).removeprefix("torch."), self.layout.name, kernels]
        if not spec.dtype.is_floating_point:
            parts.append(self.config.cache_config.cache_dtype)  # uint8 is all of fp8_e4m3, nvfp4, …
        return " ".join([*parts, *["long RoPE"] * self.long_rope])

    def place(self, num_blocks: int, buffer: np.ndarray | None, executor: UniProcExecutor) -> int:
        """Makes the tensors, over `buffer` if there is one. Returns their address."""
        nbytes = num_blocks * self.block_bytes
        cache = self._cache_config(nbytes)
        pool = None if buffer is None else torch.from_numpy(buffer.view(np.int8)[:nbytes])
        with _allocated(pool):
            executor.initialize_from_config([cache])
        tensors = executor.driver_worker.worker.model_runner.kv_caches
        (address,) = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert pool is None or address == pool.data_ptr(), "the pool is not where it was put"
        return int(address)

    def regions(self, address: int, num_blocks: int) -> tuple[Region, ...]:
        """One where blocks are contiguous, else one a layer."""
        cache = self._cache_config(num_blocks * self.block_bytes)
        if self.layout.is_block_outermost:
            stride = cache.kv_cache_tensors[0].block_stride
            return (Region(address, stride, stride),)
        return tuple(
            Region(
                address + tensor.offset + layer * tensor.layer_stride,
                tensor.block_stride,
                tensor.block_stride,
            )
            for tensor in cache.kv_cache_tensors
            for layer in range(len(tensor.layers))
        )

    def _cache_config(self, nbytes: int) -> KVCacheConfig:
        cache = get_kv_cache_config_from_groups(self.config, self.groups, nbytes)
        cache.kv_cache_layout = self.layout.name
        return cache


def _layout(config: VllmConfig, executor: UniProcExecutor, specs: Any) -> KVCacheLayout:
    """The first that the attention takes of those where a block is few stretches of memory."""
    (names,) = supported = executor.get_supported_kv_cache_layouts()
    compact = [name for name in names if KVCacheLayout[name].is_block_compact]
    if not compact:
        raise ModelError(f"its attention scatters blocks in vLLM: {', '.join(names)}")
    whole = [name for name in compact if KVCacheLayout[name].is_block_outermost]
    config.cache_config.kv_cache_layout = (whole or compact)[0]
    layout = resolve_kv_cache_layout(config, supported, specs.values())
    executor.set_kv_cache_layout(layout.name)
    return layout


@contextmanager
def _allocated(pool: torch.Tensor | None) -> Iterator[None]:
    """vLLM's zeroed bytes of that size are `pool`."""
    if pool is None:
        yield
        return
    with _InPool(pool):
        yield


class _InPool(TorchFunctionMode):
    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__()
        self._pool = pool

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and args == (len(self._pool),) and kwargs.get("dtype") is torch.int8:
            return self._pool
        return func(*args, **kwargs)
