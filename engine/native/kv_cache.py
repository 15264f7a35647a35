"""The memory of the KV pool. Which block belongs to whom is kvcache/block_pool.py's business."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from crossdock.engine.contract import WIRE_VERSION
from crossdock.model.config import ModelConfig
from crossdock.proto.memory import PoolMemory, region_sizes
from crossdock.proto.v1 import worker_pb2


class KVCache:
    """`data [blocks, layers, 2, kv_heads, block_size, head_dim]` and `generations [blocks]`.
    `buffer` (uint8, num_blocks * block_bytes or more) and `generations` (int64) let a transport own
    the memory; without them it is allocated here, on `device`."""

    def __init__(
        self,
        num_blocks: int,
        config: ModelConfig,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        buffer: np.ndarray | None = None,
        generations: np.ndarray | None = None,
    ) -> None:
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.device = torch.device(device)
        shape = (config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        if buffer is None:
            self.data = torch.zeros((num_blocks, *shape), dtype=dtype, device=self.device)
        else:
            if self.device.type != "cpu":
                raise ValueError(f"a buffer of the host cannot be the pool on {self.device}")
            nbytes = num_blocks * self.bytes_per_block(config, block_size, dtype)
            if buffer.nbytes < nbytes:
                raise ValueError(f"buffer: {buffer.nbytes} bytes, the pool needs {nbytes}")
            flat = torch.from_numpy(buffer.view(np.uint8).reshape(-1)[:nbytes])
            self.data = flat.view(dtype).view(num_blocks, *shape)
        self.generations = (
            np.zeros(num_blocks, dtype=np.int64) if generations is None else generations
        )
        if self.generations.dtype != np.int64 or self.generations.shape != (num_blocks,):
            raise ValueError(f"generations must be int64 [{num_blocks}]")
        self._config = config

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Keys and values of `block_size` tokens in all layers, bytes."""
        elements = 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim
        return elements * dtype.itemsize

    @cached_property
    def memory(self) -> PoolMemory:
        """The same for transports: every block is contiguous, and they lie end to end."""
        return PoolMemory.block_major(
            self.data.data_ptr(),
            self.num_blocks,
            self.bytes_per_block(self._config, self.block_size, self.dtype),
            self.generations,
            "DRAM" if self.device.type == "cpu" else "VRAM",
            self.device.index or 0,
        )

    def layout(self, model_id: str, digest: str) -> worker_pb2.KVLayout:
        """All that must agree before another worker may read this cache."""
        return worker_pb2.KVLayout(
            wire_version=WIRE_VERSION,
            engine="native",
            model_id=model_id,
            weights_digest=digest,
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.block_size,
            layers=self._config.num_layers,
            kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            tp_degree=1,
            regions=region_sizes(self.memory.regions),
        )
