"""vLLM's models: what the YAML says of them, and how an engine of them is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from crossdock.engine.contract import Allocate, EngineConfig, EngineSettings
from crossdock.engine.registry import kind_setting
from crossdock.engine.vllm.args import KV_ARGS, TENSOR_PARALLEL, check_args
from crossdock.proto.errors import ConfigError
from crossdock.proto.memory import MemoryType
from crossdock.proto.settings import no_entries, setting

if TYPE_CHECKING:
    from crossdock.engine.vllm.runner import VllmEngine

INSTALL = """vLLM is not installed here: make vllm, or "vLLM's models" in docs/operations.md"""


@dataclass(frozen=True)
class Settings(EngineSettings):
    """`engine: {kind: vllm, …}`"""

    any_family: ClassVar[bool] = True
    kind: str = kind_setting("vllm")
    args: Mapping[str, Any] = setting(
        factory=no_entries,
        doc="Of a vllm engine: vLLM's own EngineArgs, {trust_remote_code: true, …}. What Crossdock "
        "decides (model, blocks, batches, caching) is not among them.",
        check=check_args,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", dict(self.args))  # of the YAML: settings are sent

    @property
    def ranks(self) -> int:
        """Of tensor parallelism, the one kind that there is here."""
        return int(self.args.get(TENSOR_PARALLEL, 1))

    @property
    def kv_args(self) -> Mapping[str, Any]:
        """What is empty or false is as what is not there."""
        return {name: self.args.get(name) or None for name in KV_ARGS}

    def check_kv_dtype(self, dtype: str) -> None:
        if dtype != "auto":
            message = f"{dtype!r} is for engines of other kinds; args: {{kv_cache_dtype: …}} here"
            raise ConfigError("kv.dtype", message)


def memory_type(config: EngineConfig) -> MemoryType:
    """See registry.memory_type."""
    _check_installed()
    from vllm.platforms import current_platform

    return "DRAM" if current_platform.is_cpu() else "VRAM"


def create(config: EngineConfig, allocate: Allocate) -> VllmEngine:
    """See registry.create."""
    _check_installed()
    # Here: vLLM takes many seconds, and only a process that runs its models has it.
    from crossdock.engine.vllm.runner import create_engine

    return create_engine(config, allocate)


def _check_installed() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError("engine.kind", f"'vllm': {INSTALL} ({error})") from error
