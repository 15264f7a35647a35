"""What the YAML may say in `engine: {kind: vllm, args: {…}}`, checked without vLLM.

The names and types of vLLM's EngineArgs are in engine_args.yaml, which tools/vllm_args.py writes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from crossdock.proto.errors import ConfigError, show
from crossdock.proto.settings import closest

INSTEAD = {  # what the YAML says elsewhere
    "model": "model.id",
    "model_weights": "model.id",
    "served_model_name": "models, whose names clients use",
    "tokenizer*": "model.id, whose folder has it",
    "skip_tokenizer_init": "model.id, whose folder has it",
    "dtype": "model.dtype",
    "seed": "the seed of a request",
    "generation_config": "what requests say",
    "override_generation_config": "what requests say",
    "block_size": "kv.block_size",
    "kv_cache_memory_bytes": "pools.NAME.kv_memory_mb",
    "num_gpu_blocks_override": "pools.NAME.kv_memory_mb",
    "gpu_memory_utilization": "pools.NAME.kv_memory_mb",
    "max_num_seqs": "pools.NAME.max_batch",
    "max_num_active_seqs": "pools.NAME.max_batch",
    "max_num_batched_tokens": "pools.NAME.chunk_tokens",
    "max_num_scheduled_tokens": "pools.NAME.chunk_tokens",
    "long_prefill_token_threshold*": "pools.NAME.chunk_tokens",
    "max_num_queued_*": "gateway.limits",
    "kv_transfer_config": "kv.transport",
    "otlp_traces_endpoint": "telemetry",
    "collect_detailed_traces": "telemetry",
}
BY_CROSSDOCK = "Crossdock does that, and no field of vLLM's changes how"
TEXT_ONLY = "what is served here is text"
ONE_HOST = "the ranks of an engine are processes of one host here, which its worker starts"
NO_OTHER_KV = "the blocks of a hand-off are all that a sequence is made of here"
REFUSED = {  # what has no field of its own, or cannot work
    "enable_prefix_caching": BY_CROSSDOCK,
    "prefix_*": BY_CROSSDOCK,
    "enable_chunked_prefill": BY_CROSSDOCK,
    "schedul*": BY_CROSSDOCK,
    "prefill_schedule_interval": BY_CROSSDOCK,
    "async_scheduling": BY_CROSSDOCK,
    "watermark*": BY_CROSSDOCK,
    "stream_interval": BY_CROSSDOCK,
    "disable_hybrid_kv_cache_manager": BY_CROSSDOCK,
    "disable_log_stats": BY_CROSSDOCK,
    "kv_events_config": BY_CROSSDOCK,
    "structured_outputs_config": BY_CROSSDOCK,
    "reasoning_*": BY_CROSSDOCK,
    "logits_processors": BY_CROSSDOCK,
    "max_logprobs": BY_CROSSDOCK,
    "logprobs_mode": BY_CROSSDOCK,
    "use_fp64_gumbel": BY_CROSSDOCK,
    "runner": "it generates",
    "convert": "it generates",
    "pooler_config": "it generates",
    "diffusion_config": "it generates token by token",
    "speculative_config": "a step draws one token of a sequence here",
    "spec_*": "a step draws one token of a sequence here",
    "*lora*": "requests cannot name adapters here",
    "*comm_*": ONE_HOST,
    "*mm_*": TEXT_ONLY,
    "*media*": TEXT_ONLY,
    "video_*": TEXT_ONLY,
    "language_model_only": TEXT_ONLY,
    "enable_prompt_embeds": TEXT_ONLY,
    "io_processor_plugin": TEXT_ONLY,
    "ec_*": TEXT_ONLY,
    "data_parallel_*": f"{ONE_HOST}; say pools.NAME.replicas",
    "distributed_executor_backend": ONE_HOST,
    "nnodes": ONE_HOST,
    "node_rank": ONE_HOST,
    "master_*": ONE_HOST,
    "device_ids": "Ray chooses the device; say pools.NAME.resources.gpus",
    "worker_*": "Crossdock's own worker runs it",
    "*mamba*": NO_OTHER_KV,
    "*replayssm*": NO_OTHER_KV,
    "kv_offloading_*": NO_OTHER_KV,
    "kv_sharing_fast_prefill": NO_OTHER_KV,
    "*sleep*": "a worker that is not needed ends",
}
ONLY_1 = (
    "data_parallel_size",
    "decode_context_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
)
KV_ARGS = ("hf_overrides", "hf_config_path", "model_class_overrides", "disable_sliding_window")
TENSOR_PARALLEL, MOST_RANKS = "tensor_parallel_size", 64
_TYPES: Mapping[str | None, tuple[Any, str]] = {  # by its name in the table
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a string"),
    "list": (list, "a list"),
    "dict": (dict, "a mapping"),
    None: (type(None), "null"),
}


def check_args(path: str, args: Mapping[str, Any]) -> None:
    """Raises ConfigError, whose field begins with `path`, at the first argument that vLLM does not
    have, that is of another type there, or that is not for the YAML to say."""
    for name, value in args.items():
        _check_arg(f"{path}.{name}", name, value)


@functools.cache
def known_args() -> Mapping[str, list[Any]]:
    """By name, the types that an argument may have; a list among them is of its choices."""
    file = Path(__file__).with_name("engine_args.yaml")
    found: Mapping[str, list[Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def _check_arg(path: str, name: str, value: Any) -> None:
    if name not in known_args():
        meant = f"; did you mean {close}?" if (close := closest(name, known_args())) else ""
        raise ConfigError(path, f"vLLM's EngineArgs have no such field{meant}")
    if name in ONLY_1:
        if value != 1 or isinstance(value, bool):
            raise ConfigError(path, f"{show(value)} is not allowed; a vllm engine has 1")
        return
    if name == TENSOR_PARALLEL:
        if not _is(value, "int") or not 1 <= value <= MOST_RANKS:
            most = f"must be a whole number from 1 to {MOST_RANKS}"
            raise ConfigError(path, f"{show(value)} is not allowed; {most}")
        return
    if field := _first(INSTEAD, name):
        raise ConfigError(path, f"is not of args; say it with {field}")
    if why := _first(REFUSED, name):
        raise ConfigError(path, f"is not of args: {why}")
    allowed = known_args()[name]
    if not any(_is(value, kind) for kind in allowed):
        expected = " or ".join(map(_named, allowed))
        raise ConfigError(path, f"{show(value)} is not allowed; must be {expected}")


def _first(patterns: Mapping[str, str], name: str) -> str:
    return next((said for pattern, said in patterns.items() if fnmatchcase(name, pattern)), "")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return not isinstance(value, bool) and value in kind
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _TYPES[kind][0])


def _named(kind: Any) -> str:
    if isinstance(kind, list):
        return f"one of {', '.join(map(str, kind))}"
    return _TYPES[kind][1]
