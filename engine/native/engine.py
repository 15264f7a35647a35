"""This project's own engine: what the YAML says of it, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crossdock.engine.contract import Allocate, EngineConfig, EngineSettings
from crossdock.engine.registry import kind_setting
from crossdock.proto.errors import ConfigError
from crossdock.proto.memory import MemoryType
from crossdock.proto.settings import setting

if TYPE_CHECKING:
    from crossdock.engine.native.runner import ModelRunner


@dataclass(frozen=True)
class Settings(EngineSettings):
    """`engine: {kind: native, …}`"""

    kind: str = kind_setting("native")
    device: str = setting(
        "auto", "Where a native engine computes: auto (a GPU where there is one), cpu or cuda:N."
    )


def _device(config: EngineConfig) -> str:
    assert isinstance(config.engine, Settings)
    if config.engine.device == "auto" and config.gpus is not None:
        return "cuda" if config.gpus else "cpu"
    return config.engine.device


def memory_type(config: EngineConfig) -> MemoryType:
    """See registry.memory_type."""
    from crossdock.engine.native.runner import resolve_device

    return "DRAM" if resolve_device(_device(config)).type == "cpu" else "VRAM"


def create(config: EngineConfig, allocate: Allocate) -> ModelRunner:
    """See registry.create."""
    # Here: torch takes seconds, and only a process that runs a model needs it.
    from crossdock.engine.native.runner import ModelRunner, resolve_device
    from crossdock.model.config import load_config
    from crossdock.model.store import resolve

    files = resolve(config.model, config.home)
    if files.format == "bytes":
        raise ConfigError("model.id", f"{config.model!r} has no weights: see engine.kind simulated")
    device = _device(config)
    block_bytes = ModelRunner.kv_bytes_per_block(
        load_config(files), config.block_size, config.dtype, device, config.kv_dtype
    )
    num_blocks = config.blocks_of(block_bytes)
    on_host = resolve_device(device).type == "cpu"
    nbytes = num_blocks * block_bytes if on_host else 1  # a GPU's pool is the runner's own
    buffer, generations = allocate(nbytes, num_blocks)
    return ModelRunner(
        files,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        device=device,
        threads=config.threads,
        block_size=config.block_size,
        num_blocks=num_blocks,
        buffer=buffer if on_host else None,
        generations=generations,
    )
