"""This project's own engine behind the contract: model and KV pool on a CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crossdock.engine.contract import (
    KIND,
    Allocate,
    Engine,
    EngineConfig,
    EngineFacts,
    EngineSettings,
)
from crossdock.engine.sequence import SampledToken, StepPlan
from crossdock.proto.errors import ConfigError
from crossdock.proto.memory import MemoryType, PoolMemory
from crossdock.proto.settings import setting

if TYPE_CHECKING:
    from crossdock.engine.native.runner import ModelRunner


@dataclass(frozen=True)
class Settings(EngineSettings):
    """`engine: {kind: native, …}`"""

    kind: str = setting("native", KIND)
    device: str = setting(
        "auto", "Where a native engine computes: auto (a GPU where there is one), cpu or cuda:N."
    )


class NativeEngine(Engine):
    """See contract.Engine. Draws one token a step."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        files, kv, device = runner.files, runner.kv, runner.device
        self.facts = EngineFacts(
            files.model_id, files.digest, runner.config.vocab_size, runner.config.context_length
        )
        self.layout = kv.layout(files.model_id, files.digest)
        self.memory = PoolMemory(
            kv_ptr=kv.data_ptr,
            num_blocks=kv.num_blocks,
            block_bytes=kv.block_bytes,
            generations=kv.generations,
            memory_type="DRAM" if device.type == "cpu" else "VRAM",
            device_id=device.index or 0,
        )

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        drawn = iter(self._runner.run(plan))
        return [[next(drawn)] if chunk.sample else [] for chunk in plan.chunks]

    def recover(self) -> None:
        self._runner.recover()

    def warmup(self) -> None:
        self._runner.warmup()


def _device(config: EngineConfig) -> str:
    assert isinstance(config.engine, Settings)
    if config.engine.device == "auto" and config.gpus is not None:
        return "cuda" if config.gpus else "cpu"
    return config.engine.device


def memory_type(config: EngineConfig) -> MemoryType:
    """See registry.memory_type."""
    from crossdock.engine.native.runner import resolve_device

    return "DRAM" if resolve_device(_device(config)).type == "cpu" else "VRAM"


def create(config: EngineConfig, allocate: Allocate) -> NativeEngine:
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
    return NativeEngine(
        ModelRunner(
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
    )
