"""What a manifest may say of a vllm engine, checked where vLLM is not installed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from fnmatch import filter as filter_names
from pathlib import Path

import pytest

from crossdock.deploy.applied import AppliedSpec
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.engine.vllm.args import check_args, known_args
from crossdock.engine.vllm.refused import INSTEAD, ONLY_1, REFUSED
from crossdock.proto.errors import ConfigError

TEXT = """\
apiVersion: crossdock/v1
kind: Cluster
metadata: {name: any}
model: {id: some-folder}
pools:
  prefill: {role: prefill, engine: {kind: vllm}}
  decode:
    role: decode
    engine:
      kind: vllm
      args:
        max_model_len: 4096
        trust_remote_code: true
        cpu_offload_gb: 2
        quantization: null
        load_format: "dummy"
        moe_backend: triton
        offload_params: ["experts", shared]
        additional_config: {rope_scaling: {factor: 2.5}, layers: [1, two, null]}
kv: {block_size: 32}
"""
SAID = {
    "max_model_len": 4096,
    "trust_remote_code": True,
    "cpu_offload_gb": 2,
    "quantization": None,
    "load_format": "dummy",
    "moe_backend": "triton",
    "offload_params": ["experts", "shared"],
    "additional_config": {"rope_scaling": {"factor": 2.5}, "layers": [1, "two", None]},
}


def test_arguments_are_as_the_manifest_says_them_by_pool() -> None:
    spec = ClusterSpec.parse(TEXT)
    assert spec.pools["decode"].engine.args == SAID
    assert spec.pools["prefill"].engine.args == {}
    assert ClusterSpec.parse(spec.to_yaml()) == spec
    assert pickle.loads(pickle.dumps(spec.pools["decode"].engine)).args == SAID


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_model_length", "8", "no such field; did you mean max_model_len?"),
        ("zzz", "8", "vLLM's EngineArgs have no such field"),
        ("max_model_len", "4k", "'4k' is not allowed; must be a whole number or null"),
        ("max_model_len", "true", "true is not allowed; must be a whole number or null"),
        ("max_model_len", "2.5", "2.5 is not allowed; must be a whole number or null"),
        ("trust_remote_code", "1", "1 is not allowed; must be true or false"),
        ("load_format", "[a]", "['a'] is not allowed; must be a string"),
        ("additional_config", "7", "7 is not allowed; must be a mapping"),
        ("safetensors_load_strategy", "soon", "'soon' is not allowed; must be one of lazy, eager"),
        ("model", "x", "is not of args; say it with model.id"),
        ("tokenizer_mode", "hf", "say it with model.id"),
        ("block_size", "32", "say it with kv.block_size"),
        ("num_gpu_blocks_override", "9", "say it with pools.NAME.kv_memory_mb"),
        ("max_num_seqs", "9", "say it with pools.NAME.max_batch"),
        ("max_num_batched_tokens", "9", "say it with pools.NAME.chunk_tokens"),
        ("kv_transfer_config", "{}", "say it with kv.transport"),
        ("seed", "1", "say it with the seed of a request"),
        ("enable_prefix_caching", "false", "is not of args: Crossdock does that"),
        ("scheduling_policy", "fcfs", "is not of args: Crossdock does that"),
        ("speculative_config", "{}", "a step draws one token"),
        ("enable_lora", "true", "requests cannot name adapters"),
        ("limit_mm_per_prompt", "{}", "what is served here is text"),
        ("data_parallel_rank", "0", "say pools.NAME.replicas"),
        ("pipeline_parallel_size", "2", "2 is not allowed; a vllm engine has 1"),
        ("data_parallel_size", "true", "true is not allowed; a vllm engine has 1"),
        ("tensor_parallel_size", "0", "0 is not allowed; must be a whole number from 1 to 64"),
        ("tensor_parallel_size", "true", "true is not allowed; must be a whole number from 1"),
        ("tensor_parallel_size", "2.0", "2.0 is not allowed; must be a whole number from 1"),
        ("tensor_parallel_size", "4", "4 cannot hand KV to or from 1 of pools.prefill"),
        ("dcp_comm_backend", "a2a", "only context parallelism uses it"),
        ("enable_nccl_comm_suspend", "true", "processes of one host here"),
        ("log_config_file", "/not/there", "say it with log_level among the args"),
        ("enable_eplb", "true", "after it has drawn tokens, which it does not here"),
        ("enable_dbo", "true", "only data parallelism uses it; say pools.NAME.replicas"),
        ("kv_cache_metrics", "true", "vLLM's own metrics"),
        ("revision", "main", "model.id is a folder"),
        ("distributed_executor_backend", "mp", "processes of one host here"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_line(name: str, value: str, message: str) -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(f"        {name}:")]
    lines.insert(lines.index("      args:") + 1, f"        {name}: {value}")
    text = "\n".join(lines)
    with pytest.raises(ConfigError) as caught:
        ClusterSpec.parse(text, "c.yaml")
    assert caught.value.field == f"pools.decode.engine.args.{name}"
    assert message in caught.value.message
    line = 1 + text.splitlines().index(f"        {name}: {value}")
    assert caught.value.where == f"c.yaml:{line}"


def degrees(prefill: str, decode: str, **kv: str) -> ClusterSpec:
    text = f"""\
metadata: {{name: any}}
model: {{id: some-folder}}
pools:
  prefill: {{role: prefill, {prefill}}}
  decode: {{role: decode, {decode}}}
kv: {{{", ".join(f"{name}: {value}" for name, value in kv.items())}}}
"""
    return ClusterSpec.parse(text)


TWO = "engine: {kind: vllm, args: {tensor_parallel_size: 2}}"
FOUR = TWO.replace("2", "4")
ONE = "engine: {kind: vllm}"
FP8 = "engine: {kind: vllm, args: {kv_cache_dtype: fp8_e5m2}}"
OVER = "engine: {kind: vllm, args: {hf_overrides: {rope_theta: 5.0}}}"
FIELD = "engine.args.tensor_parallel_size"


def test_equal_degrees_of_tensor_parallelism_are_taken() -> None:
    spec = degrees(f"{TWO}, resources: {{gpus: 2}}", TWO)
    assert [pool.engine.ranks for pool in spec.pools.values()] == [2, 2]
    half = f"{ONE}, resources: {{gpus: 0.5}}"  # which workers of one rank may share
    assert [pool.engine.ranks for pool in degrees(ONE, half).pools.values()] == [1, 1]
    assert ClusterSpec.parse(spec.to_yaml()) == spec


@pytest.mark.parametrize(
    ("prefill", "decode", "kv", "field", "message"),
    [
        (TWO, FOUR, {}, f"pools.decode.{FIELD}", "4 cannot hand KV to or from 2 of pools.prefill"),
        (TWO, ONE, {}, f"pools.decode.{FIELD}", "1 cannot hand KV to or from 2 of pools.prefill"),
        (FOUR, f"{FOUR}, resources: {{gpus: 2}}", {}, f"pools.decode.{FIELD}", "4 is not allowed"),
        (TWO, TWO, {"verify": "checksum"}, "kv.verify", "pools.prefill has 2"),
        (
            *(ONE, FP8, {}, "pools.decode.engine.args.kv_cache_dtype"),
            "'fp8_e5m2' is not None: KV would mean something else than to pools.prefill",
        ),
        (
            *(OVER, ONE, {}, "pools.decode.engine.args.hf_overrides"),
            "None is not {'rope_theta': 5.0}: KV would mean something else than to pools.prefill",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused(
    prefill: str, decode: str, kv: dict[str, str], field: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        degrees(prefill, decode, **kv)
    assert caught.value.field == field and message in caught.value.message


def test_a_degree_stays_while_the_cluster_runs(tmp_path: Path) -> None:
    """Else KV would go from two ranks to four, half-way through."""
    store = ClusterStore("any", tmp_path)
    store.begin(degrees(TWO, TWO).to_yaml(), "life")
    applied = AppliedSpec(store)
    applied.check_change(degrees(TWO.replace("}}", ", max_model_len: 512}}"), TWO))
    with pytest.raises(ConfigError, match="cannot change from 2 to 4 while the cluster runs"):
        applied.check_change(degrees(FOUR, FOUR))


def test_what_kv_means_stays_while_the_cluster_runs(tmp_path: Path) -> None:
    """Of workers that are replaced one after the other, some would have the old meaning."""
    store = ClusterStore("any", tmp_path)
    same = ONE.replace("vllm}", "vllm, args: {hf_overrides: {}}}")
    store.begin(degrees(ONE, same).to_yaml(), "life")
    applied = AppliedSpec(store)
    applied.check_change(degrees(ONE, ONE))
    with pytest.raises(ConfigError, match=r"args.hf_overrides: cannot change from None to {'rope"):
        applied.check_change(degrees(OVER, OVER))


def test_what_is_nested_in_them_is_yaml_as_well() -> None:
    twice = TEXT.replace("{factor: 2.5}", "{factor: 2.5, factor: 3}")
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor: is given twice"):
        ClusterSpec.parse(twice)
    dated = TEXT.replace("factor: 2.5", "factor: 2026-01-01")
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor: .*quote it"):
        ClusterSpec.parse(dated)


def test_one_of_each_is_what_there_is() -> None:
    check_args("args", dict.fromkeys(ONLY_1, 1))


def test_what_is_refused_is_vllms() -> None:
    known = list(known_args())
    assert not [name for name in (*INSTEAD, *REFUSED, *ONLY_1) if not filter_names(known, name)]


# What vLLM's model, loader, model runner or ranks read: all that is not refused. An argument that a
# new vLLM brings is in neither until somebody has looked where it is read.
EFFECTIVE = """
additional_config allow_deprecated_quantization attention_backend attention_config code_revision
compilation_config config_format cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params
cudagraph_capture_sizes disable_custom_all_reduce disable_sliding_window distributed_timeout_seconds
enable_ep_weight_filter enable_expert_parallel enable_flashinfer_autotune enable_hc_sp
enable_layerwise_nvtx_tracing enforce_eager engram_config expert_placement_strategy
fail_on_environ_validation hf_config_path hf_overrides hf_token ir_op_priority jit_monitor_mode
jit_monitor_verbose kernel_config kv_cache_dtype kv_cache_dtype_skip_layers linear_backend
load_format log_level max_cudagraph_capture_size max_model_len model_class_overrides model_impl
model_loader_extra_config moe_backend offload_backend offload_group_size offload_num_in_group
offload_params offload_prefetch_step optimization_level performance_mode pt_load_map_location
quantization quantization_config safetensors_load_strategy safetensors_prefetch_block_size
safetensors_prefetch_num_threads sparse_indexer_topk_backend tensor_parallel_size trust_remote_code
use_tqdm_on_load
"""


def test_each_argument_takes_effect_or_is_refused() -> None:
    known = list(known_args())
    refused = {name for pattern in (*INSTEAD, *REFUSED) for name in filter_names(known, pattern)}
    assert set(known) - refused - set(ONLY_1) == set(EFFECTIVE.split())


def test_manifests_are_checked_without_vllm() -> None:
    code = (
        "import sys; from crossdock.deploy.spec import ClusterSpec; "
        f"ClusterSpec.parse({TEXT!r}); sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
