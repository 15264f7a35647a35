"""Fields of vLLM's EngineArgs that no manifest may say, each with what it is answered. The others
reach vLLM's configuration, and take effect below its scheduler: in its model, its loader, its model
runner or its ranks."""

from __future__ import annotations

from collections.abc import Mapping

INSTEAD: Mapping[str, str] = {  # what the YAML says elsewhere
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
    "log_config_file": "log_level among the args: a worker writes one log",
    "logging_config": "log_level among the args: a worker writes one log",
}

_REFUSED: Mapping[str, tuple[str, ...]] = {  # by reason
    "Crossdock does that, and no field of vLLM's changes how": (
        *("enable_prefix_caching", "prefix_*", "enable_chunked_prefill", "schedul*"),
        *("prefill_schedule_interval", "async_scheduling", "watermark", "stream_interval"),
        *("disable_hybrid_kv_cache_manager", "kv_events_config", "structured_outputs_config"),
        *("reasoning_*", "logits_processors", "max_logprobs", "logprobs_mode"),
    ),
    "tokens are drawn by Crossdock's sampler, vLLM's does not run": (
        *("use_fp64_gumbel", "return_sampling_mask", "watermark_config"),
    ),
    "vLLM moves experts after it has drawn tokens, which it does not here": (
        *("enable_eplb", "eplb_config"),
    ),
    "vLLM's own metrics are asked for by nobody here": (
        *("disable_log_stats", "*metrics*", "custom_histogram_buckets"),
        "enable_logging_iteration_details",
    ),
    "only vLLM's own server uses it": (
        *("aggregate_engine_logging", "renderer_num_workers", "shutdown_timeout", "tokens_only"),
    ),
    "only vLLM's second model runner uses it, which does not run here": (
        *("aux_output_config", "enable_batch_sharded_sampling", "enable_return_routed_experts"),
        *("enable_trace_replay", "swa_bounded_replay"),
    ),
    "vLLM 0.32 does not use it": ("disable_cascade_attn", "max_parallel_loading_workers"),
    "nothing starts vLLM's profiler here": ("profiler_config",),
    "weights stay as they are; others are another model": ("weight_transfer_config",),
    "model.id is a folder, of which nothing is fetched": (
        *("download_dir", "ignore_patterns", "revision"),
    ),
    "it generates, token by token": ("runner", "convert", "pooler_config", "diffusion_config"),
    "a step draws one token of a sequence here": ("speculative_config", "spec_*"),
    "requests cannot name adapters here": ("*lora*",),
    "what is served here is text": (
        *("mm_*", "*_mm_*", "*media*", "video_*", "language_model_only", "enable_prompt_embeds"),
        *("io_processor_plugin", "ec_*"),
    ),
    "only data parallelism uses it; say pools.NAME.replicas": (
        *("data_parallel_*", "*elastic_ep*", "*fault_tolerance*", "all2all_backend"),
        *("enable_dbo", "dbo_*", "ubatch_size", "dp_*", "*dp_synchronization"),
    ),
    "only context parallelism uses it, which there is not here": (
        *("dcp_*", "cp_kv_cache_interleave_size"),
    ),
    "the ranks of an engine are processes of one host here, which its worker starts": (
        *("distributed_executor_backend", "nnodes", "node_rank", "master_*", "*comm_*"),
        *("enable_shm_tensor_arena", "numa_bind*", "ray_workers_use_nsight"),
    ),
    "Ray chooses the device; say pools.NAME.resources.gpus": ("device_ids",),
    "Crossdock's own worker runs it": ("worker_*",),
    "the blocks of a hand-off are all that a sequence is made of here": (
        *("*mamba*", "*replayssm*", "gdn_*", "kda_*"),
        *("kv_offloading_*", "kv_sharing_fast_prefill"),
    ),
    "a worker that is not needed ends": ("*sleep*", "enable_cumem_allocator"),
}
REFUSED: Mapping[str, str] = {name: why for why, names in _REFUSED.items() for name in names}
ONLY_1 = (
    *("data_parallel_size", "decode_context_parallel_size"),
    *("pipeline_parallel_size", "prefill_context_parallel_size"),
)
