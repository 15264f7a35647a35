"""vLLM's configuration, from a worker's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from crossdock.engine.contract import EngineConfig
from crossdock.engine.vllm.engine import Settings
from crossdock.model.store import ModelFiles
from crossdock.proto.errors import ConfigError, ModelError

# The runner's logits are read from its own state: one process, one version of it.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm_config(config: EngineConfig, files: ModelFiles) -> VllmConfig:
    """Raises ConfigError for what vLLM or this engine does not accept, ModelError for a model."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if files.format != "hf":
        message = f"{config.model!r}: a vllm engine takes a folder in Hugging Face layout"
        how = f"make one with: crossdock model export {config.model} FOLDER"
        raise ConfigError("model.id", f"{message}; {how}")
    settings = config.engine
    assert isinstance(settings, Settings)
    args = {"enforce_eager": current_platform.is_cpu()} | dict(settings.args)
    with refusals(files.path, OSError):  # as of a configuration's file that is not there
        return EngineArgs(**args, **_own(config, files)).create_engine_config()


_REFUSED = (  # NotImplementedError is a RuntimeError, of which the others are the device's
    *(ValueError, TypeError, NotImplementedError, LookupError, AttributeError),
    *(AssertionError, ImportError),
)


@contextmanager
def refusals(model: str | Path, *more: type[Exception]) -> Iterator[None]:
    """What vLLM raises for models and arguments that it does not take, as ModelError: the next
    worker would meet it as well. Others are the device's; not those of `more`."""
    refused: tuple[type[Exception], ...] = _REFUSED + more
    try:
        yield
    except refused as error:
        raise ModelError(f"{model}: vLLM: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _own(config: EngineConfig, files: ModelFiles) -> dict[str, Any]:
    """What is not vLLM's to decide: blocks, their cache and the batches are Crossdock's."""
    dtype = config.dtype
    if dtype == "auto" and current_platform.is_cpu():
        dtype = "float32"  # see native.runner.resolve_dtype
    most = config.max_batch + config.chunk_tokens  # tokens of a step, and so its sequences
    return {
        "model": str(files.path),
        "dtype": dtype,
        "block_size": config.block_size,
        "max_num_seqs": most,
        "max_num_batched_tokens": most,
        "kv_cache_memory_bytes": (config.kv_memory_mb << 20) // config.engine.ranks,
        "skip_tokenizer_init": True,
        "language_model_only": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "disable_hybrid_kv_cache_manager": True,
        "async_scheduling": False,
        "disable_log_stats": True,
    }
