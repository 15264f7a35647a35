"""The YAML of a cluster: what it means, and that every error names file, line and field."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from crossdock.deploy.autoscaling.rules import config_of
from crossdock.deploy.runtime import gateway_launch, worker_launch
from crossdock.deploy.spec import ClusterSpec, LimitsSpec, PoolSpec
from crossdock.deploy.spec_yaml import locate
from crossdock.proto.errors import ConfigError
from crossdock.proto.hashing import hash_key
from crossdock.proto.types import Role
from crossdock.router.placement.peers import PrefixThreshold

MANIFESTS = Path(__file__).resolve().parents[3] / "deploy" / "manifests"
TEXT = """\
apiVersion: crossdock/v1
kind: Cluster
metadata: {name: local}
model: {id: smollm2-135m-instruct, dtype: auto}
gateway:
  replicas: 2
  grpc: "127.0.0.1:50051"
  http: "127.0.0.1:8000"
pools:
  prefill:
    role: prefill
    replicas: 1
    resources: {cpus: 2, gpus: 0, custom: {rack-a: 1}}
    nodes: {labels: {zone: east}}
  decode:
    role: decode
kv: {transport: nixl, block_size: 16, ucx: {TLS: tcp}}
slo: {ttft_ms: 2000}
"""

WRONG = [
    # replaced, by, line, field, part of the message
    ("role: decode", "role: decoder", 16, "pools.decode.role", "one of prefill, decode, colocated"),
    ("  replicas: 2", "  replica: 2", 6, "gateway.replica", "did you mean replicas?"),
    ("  replicas: 2", "  replicas: two", 6, "gateway.replicas", "a whole number, not 'two'"),
    ("  replicas: 2", "  replicas: 0", 6, "gateway.replicas", "must be from 1 to 64"),
    ("  replicas: 2", "  policy: kv", 6, "gateway.policy", "predicted_latency, round_robin"),
    (
        "  replicas: 2",
        "  policies: {kv_cost: {temperature: -1}}",
        6,
        "gateway.policies.kv_cost.temperature",
        "must be from 0 to 1000",
    ),
    (
        "    replicas: 1",
        "    replicas: 1\n    autoscale: {min: 2, max: 4}",
        12,
        "pools.prefill.replicas",
        "1 is not allowed; must be from autoscale.min, 2, to autoscale.max, 4",
    ),
    (
        "    replicas: 1",
        "    autoscale: {min: 3, max: 2}",
        12,
        "pools.prefill.autoscale.max",
        "2 is not allowed; must be at least min, 3",
    ),
    (
        "    replicas: 1",
        "    autoscale: {min: 3}",
        12,
        "pools.prefill.autoscale.max",
        "is missing beside min: 3",
    ),
    (
        "slo: {ttft_ms: 2000}",
        "autoscale: {interval_s: 0}",
        18,
        "autoscale.interval_s",
        "must be from 0.1 to 3600",
    ),
    ("    replicas: 1", "    replicas: -1", 12, "pools.prefill.replicas", "from 0 to 1024"),
    ("    replicas: 1", "    replicas: 1.5", 12, "pools.prefill.replicas", "a whole number"),
    ("dtype: auto", "dtype: int8", 4, "model.dtype", "auto, float32, bfloat16, float16"),
    ("dtype: auto", "dtype: auto, dtype: auto", 4, "model.dtype", "given twice, first on line 4"),
    ("id: smollm2-135m-instruct", "id: ''", 4, "model.id", "must not be empty"),
    ("name: local", "name: 12", 3, "metadata.name", "must be a string, not '12'; quote it"),
    ("name: local", "name: My_Cluster", 3, "metadata.name", "a-z, 0-9 and -"),
    ("metadata: {name: local}", "metadata: {}", 3, "metadata.name", "is missing"),
    ("metadata: {name: local}", "metadata: [local]", 3, "metadata", "a mapping, not a list"),
    ("metadata: {name: local}", "", 1, "metadata", "is missing"),
    ("127.0.0.1:8000", "127.0.0.1", 8, "gateway.http", "must be HOST:PORT"),
    ("127.0.0.1:8000", "127.0.0.1:70000", 8, "gateway.http", "port from 0 to 65535"),
    ("127.0.0.1:8000", "127.0.0.1:65535", 6, "gateway.replicas", "above 65535"),
    ("127.0.0.1:8000", "127.0.0.1:50050", 8, "gateway.http", "also the port of controller.grpc"),
    ("127.0.0.1:8000", "127.0.0.1:50052", 7, "gateway.grpc", "also the port of gateway.http"),
    ("127.0.0.1:8000", "0.0.0.0:50051", 8, "gateway.http", "also the port of gateway.grpc"),
    ("127.0.0.1:50051", "[::]:50050", 7, "gateway.grpc", "also the port of controller.grpc"),
    ("127.0.0.1:50051", "localhost:50050", 7, "gateway.grpc", "also the port of controller.grpc"),
    ("cpus: 2", "cpus: .nan", 13, "pools.prefill.resources.cpus", "from 0 to 4096"),
    ("rack-a: 1", "rack-a: 0", 13, "pools.prefill.resources.custom.rack-a", "least is 0.0001"),
    ("rack-a: 1", "GPU: 1", 13, "pools.prefill.resources.custom.GPU", "use resources.gpus"),
    ("rack-a: 1", "HPU: 0.5", 13, "pools.prefill.resources.custom.HPU", "Ray lends HPU whole"),
    ("rack-a: 1", "TPU: 3", 13, "pools.prefill.resources.custom.TPU", "Ray lends 1, 2, 4 or 8"),
    ("cpus: 2", "cpus: 0.00001", 13, "pools.prefill.resources.cpus", "least is 0.0001"),
    ("zone: east", "a b: east", 14, "pools.prefill.nodes.labels.a b", "no label key"),
    ("zone: east", "zone: -east", 14, "pools.prefill.nodes.labels.zone", "no label value"),
    ("zone: east", "zone: [east]", 14, "pools.prefill.nodes.labels.zone", "a string, not a list"),
    ("block_size: 16", "block_size: 20", 17, "kv.block_size", "one of 8, 16, 32, 64, 128"),
    ("block_size: 16", "block_size: yes", 17, "kv.block_size", "a whole number, not 'yes'"),
    ("transport: nixl", "transport: rdma", 17, "kv.transport", "one of nixl, nccl, local"),
    ("ttft_ms: 2000", "ttft_ms:", 18, "slo.ttft_ms", "must be a number, not nothing"),
    ("ttft_ms: 2000", "tfft_ms: 2000", 18, "slo.tfft_ms", "did you mean ttft_ms?"),
    ("    role: decode", "    role: prefill", 9, "pools", "2 prefill, 0 decode, 0 colocated"),
    ("  decode:", "  gateway:", 15, "pools.gateway", "taken by the gateways"),
    ("  decode:", "  De_code:", 15, "pools.De_code", "is not a pool name"),
    ("kind: Cluster", "kind: Pod", 2, "kind", "one of Cluster"),
    ("crossdock/v1", "crossdock/v2", 1, "apiVersion", "one of crossdock/v1"),
    ("model: {", "modle: {", 4, "modle", "did you mean model?"),
    ("slo: {", "slo: }", 18, "yaml", "expected"),
]  # fmt: skip


@pytest.mark.parametrize("old, new, line, field, message", WRONG, ids=[w[1] or w[0] for w in WRONG])
def test_errors_name_file_line_field_and_what_is_allowed(old, new, line, field, message):
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        ClusterSpec.parse(TEXT.replace(old, new), "cluster.yaml")
    assert str(caught.value).startswith(f"cluster.yaml:{line}: {field}: ")
    assert message in str(caught.value)
    assert caught.value.field == field


def test_hosts_of_their_own_share_a_port_number():
    apart = TEXT.replace("127.0.0.1:8000", "127.0.0.2:50051")
    assert ClusterSpec.parse(apart).gateway_addresses(0)[1] == "127.0.0.2:50051"


def test_a_pool_computes_where_its_resources_are():
    """Without gpus on the CPU, whatever the host has: Ray keeps no two such workers apart."""
    spec = ClusterSpec.parse(
        TEXT.replace("role: decode\n", "role: decode\n    resources: {gpus: 1}\n")
    )
    gpus = {pool: worker_launch(spec, pool, "w", bytes(32)).worker.gpus for pool in spec.pools}
    assert gpus == {"prefill": 0, "decode": 1}


def test_a_type_of_kv_that_an_engine_has_not_is_refused_in_the_file():
    text = TEXT.replace("transport: nixl", "dtype: float16")
    assert ClusterSpec.parse(text).kv.dtype == "float16"
    for role in ("prefill", "decode"):
        text = text.replace(f"role: {role}\n", f"role: {role}\n    engine: {{kind: simulated}}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:19: kv\.dtype: 'float16' is no type of KV"):
        ClusterSpec.parse(text, "c.yaml")


def test_nccl_needs_a_whole_gpu_for_each_worker():
    def spec(prefill: str, decode: str) -> ClusterSpec:
        text = TEXT.replace("transport: nixl", "transport: nccl")
        text = text.replace("gpus: 0", f"gpus: {prefill}")
        return ClusterSpec.parse(
            text.replace("role: decode\n", f"role: decode\n{decode}"), "c.yaml"
        )

    gpus = "    resources: {gpus: 1}\n"
    assert spec("1", gpus).kv.transport == "nccl"
    with pytest.raises(ConfigError, match=r"c\.yaml:13: pools\.prefill\.resources\.gpus: 0\.5"):
        spec("0.5", gpus)
    with pytest.raises(ConfigError, match=r"pools\.decode\.resources\.gpus: 0 is not .* least 1"):
        spec("1", "")


@pytest.mark.parametrize(
    "text", ["", "# nothing", "[1]", "a", "\x00", "a: &a {b: *a}", "a: 1\n---\n"]
)
def test_what_is_no_cluster_at_all(text):
    with pytest.raises(ConfigError, match=r"^cluster\.yaml"):
        ClusterSpec.parse(text, "cluster.yaml")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: file: cannot be read"):
        ClusterSpec.load(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        ClusterSpec.load(tmp_path / "latin.yaml")


@examples(50)
@given(st.text(max_size=200))
def test_no_text_makes_it_fail_otherwise(text):
    try:
        ClusterSpec.parse(text)
    except ConfigError:
        pass
    else:
        raise AssertionError("random text is a cluster")


def test_values_and_defaults():
    spec = ClusterSpec.parse(TEXT)
    prefill, decode = spec.pools["prefill"], spec.pools["decode"]
    assert prefill.resources.cpus == 2.0 and prefill.engine_threads == 2
    assert prefill.nodes.labels == {"zone": "east"}
    assert decode == PoolSpec(role="decode") and decode.engine_threads == 1
    assert spec.gateway.limits == LimitsSpec()
    assert spec.controller.grpc == "127.0.0.1:50050"
    assert spec.gateway_addresses(1) == ("127.0.0.1:50052", "127.0.0.1:8001")


def test_a_gateway_gets_the_policy_and_its_numbers():
    told = "  policy: prefix_threshold\n  policies: {prefix_threshold: {balance_abs: 8}}\n"
    spec = ClusterSpec.parse(TEXT.replace("  replicas: 2\n", told))
    config = gateway_launch(spec, "gateway-0", 0, b"c" * 32, b"o" * 32).gateway
    assert config.policies.named(config.policy) == PrefixThreshold(0.3, 8, 1.5)
    older = ClusterSpec.parse(TEXT.replace("  replicas: 2", "  policy: least_latency"))
    assert older.gateway.policy == "least_latency"
    assert ClusterSpec.parse(TEXT).gateway.policy == "predicted_latency"


def test_a_spec_survives_being_written_and_read():
    spec = ClusterSpec.parse(TEXT)
    assert ClusterSpec.parse(spec.to_yaml()) == spec


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.yaml")), ids=lambda path: path.name)
def test_manifests_are_valid(path):
    if "kuberay" not in path.name:
        assert ClusterSpec.load(path).pools


def test_model_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(TEXT.replace("id: smollm2-135m-instruct", "id: ./models/m"))
    assert ClusterSpec.load(tmp_path / "c.yaml").model.id == str(tmp_path / "models" / "m")


def test_another_relative_path_of_a_model_is_taken_from_here(tmp_path, monkeypatch):
    """The cluster's processes work in another folder."""
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "smollm2-135m-instruct").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ClusterSpec.parse(TEXT).model.id == "smollm2-135m-instruct", "which is known by name"
    text = TEXT.replace("id: smollm2-135m-instruct", "id: models/m")
    assert ClusterSpec.parse(text).model.id == str(tmp_path / "models" / "m")


FOREIGN = [
    ("{TLS: tcp}", "{MODULE_DIR: /tmp/mine}", "kv.ucx.MODULE_DIR"),
    ("{TLS: tcp}", "{LOG_FILE: /root/.bashrc}", "kv.ucx.LOG_FILE"),
    ("{TLS: tcp}", "{GDB_COMMAND: sh}", "kv.ucx.GDB_COMMAND"),
    ("{TLS: tcp}", "{UCX_TLS: tcp}", "kv.ucx.UCX_TLS"),
    ("{TLS: tcp}", r'{TLS: "tcp\0"}', "kv.ucx.TLS"),
    ("slo: {", "ray: {address: 'evil://x'}\nslo: {", "ray.address"),
    ("slo: {", "telemetry: {endpoint: 'unix:///x'}\nslo: {", "telemetry.endpoint"),
    ("name: local", "name: ../../etc", "metadata.name"),
]


@pytest.mark.parametrize("before, after, path", FOREIGN, ids=[path for _, _, path in FOREIGN])
def test_nothing_in_a_spec_becomes_code_or_a_path_of_its_own(before, after, path):
    assert before in TEXT
    with pytest.raises(ConfigError) as refused:
        ClusterSpec.parse(TEXT.replace(before, after))
    assert refused.value.field == path


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000])
def test_a_deep_file_is_refused_and_not_fallen_over(text):
    with pytest.raises(ConfigError, match=r"yaml: .*nested too deeply"):
        ClusterSpec.parse(text)


def test_replicas_do_not_change_a_revision_but_settings_do():
    spec = ClusterSpec.parse(TEXT)
    revision = spec.pool_revision("decode")
    assert spec.with_replicas("decode", 3).pool_revision("decode") == revision
    pools = {**spec.pools, "decode": replace(spec.pools["decode"], max_batch=8)}
    changed = replace(spec, pools=pools)
    assert changed.pool_revision("decode") != revision
    assert changed.pool_revision("prefill") == spec.pool_revision("prefill")
    other_port = replace(spec, gateway=replace(spec.gateway, http="127.0.0.1:9000"))
    assert other_port.gateway_revision() != spec.gateway_revision()
    assert other_port.pool_revision("decode") == revision


@pytest.mark.parametrize(
    "pool, replicas, message",
    [
        ("encode", 1, "'encode' is unknown; the pools are decode, prefill"),
        ("decode", 0, "nothing could be served"),
        ("decode", 5000, "must be from 0 to 1024"),
    ],
)
def test_scaling_to_what_cannot_be(pool, replicas, message):
    with pytest.raises(ConfigError, match=message):
        ClusterSpec.parse(TEXT).with_replicas(pool, replicas)


AUTOSCALED = """
metadata: {name: local}
model: {id: any}
pools:
  p: {role: prefill, replicas: 2, autoscale: {min: 1, max: 8}}
  d: {role: decode, replicas: 3, autoscale: {min: 2, max: 6, start_s: 20}}
"""


def test_an_autoscaled_pool_has_bounds_and_takes_no_fixed_size():
    spec = ClusterSpec.parse(AUTOSCALED)
    config = config_of(spec)
    assert [(pool.least, pool.most, pool.start_s) for pool in config.pools] == [
        (1, 8, 60.0),
        (2, 6, 20.0),
    ]
    assert config.pools[0].alike == config.pools[1].alike != ""
    sized = spec.sized({"p": 99, "d": 0})
    assert [pool.replicas for pool in sized.pools.values()] == [8, 2]
    assert spec.sized({}) == spec
    assert sized.pool_revision("p") == spec.pool_revision("p")
    with pytest.raises(ConfigError, match=r"'p' has no fixed size: .* from 1 to 8 .*pools.p.auto"):
        spec.with_replicas("p", 4)
    fixed = ClusterSpec.parse(AUTOSCALED.replace(", autoscale: {min: 1, max: 8}", ""))
    assert fixed.with_replicas("p", 4).pools["p"].replicas == 4
    assert not config_of(fixed).pools[0].autoscaled


def test_pools_of_other_settings_are_not_alike():
    config = config_of(
        ClusterSpec.parse(AUTOSCALED.replace("replicas: 3", "replicas: 3, chunk_tokens: 64"))
    )
    assert config.pools[0].alike != config.pools[1].alike


@pytest.mark.parametrize(
    ("old", "new", "field", "message"),
    [
        ("model: {id: any}", "model: {id: any}\nautoscale: {gpus: 2}", "autoscale.gpus",
         "2 is not allowed; the pools' autoscale.min need 3 already"),
        ("model: {id: any}", "model: {id: any}\nautoscale: {gpus: 4}", "autoscale.gpus",
         "4 is not allowed; the pools' replicas, with which they start, need 5"),
        ("  p:", "  q: {role: prefill, autoscale: {max: 2}}\n  p:", "pools.p.autoscale",
         "pools.q is autoscaled and prefill as well"),
        ("  p:", "  q: {role: colocated}\n  p:", "pools.p.autoscale", "colocated workers beside"),
    ],
)  # fmt: skip
def test_autoscaled_pools_must_fit_together(old, new, field, message):
    with pytest.raises(ConfigError) as raised:
        ClusterSpec.parse(AUTOSCALED.replace(old, new))
    assert raised.value.field == field and message in raised.value.message


def test_colocated_workers_serve_alone():
    text = TEXT.replace("role: prefill", "role: colocated").replace("role: decode", "role: prefill")
    assert ClusterSpec.parse(text).pools["prefill"].role == "colocated"


def test_locate_finds_the_line_or_that_of_what_encloses_it():
    assert locate(TEXT, "c.yaml", "pools.prefill.role") == "c.yaml:11"
    assert locate(TEXT, "c.yaml", "pools.decode.threads") == "c.yaml:15"


def test_launches_carry_what_the_spec_says():
    spec = ClusterSpec.parse(TEXT)
    launch = worker_launch(spec, "prefill", "prefill-0", b"k" * 32)
    assert launch.worker.role is Role.PREFILL and launch.worker.threads == 2
    assert launch.worker.transport_options == {"TLS": "tcp"}
    assert launch.placement.env["OMP_NUM_THREADS"] == "2"
    assert launch.placement.env["UCX_TLS"] == "tcp"
    assert launch.placement.labels == {"zone": "east"}
    assert launch.placement.custom == {"rack-a": 1.0}
    assert launch.revision == launch.worker.revision == spec.pool_revision("prefill")
    gateway = gateway_launch(spec, "gateway-1", 1, b"k" * 32, b"g" * 32)
    assert gateway.gateway.hash_key == hash_key(b"k" * 32)
    assert "hash_key" not in repr(gateway) and "cluster_key" not in repr(launch)
    assert gateway.gateway.grpc == "127.0.0.1:50052" and gateway.placement.on_head


AMOUNTS = [0.00001, 0.00009, 0.0001, 0.00015, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0, 1e9]
LABELS = [
    "a",
    "a-b_c.D",
    "a b",
    "-a",
    "a-",
    "a" * 63,
    "a" * 64,
    "x.y/a",
    "x/y/a",
    "-x/a",
    "x_/a",
    "",
]
SELECTORS = [
    "b",
    "",
    "!b",
    "in(b,c)",
    "in(b, c)",
    "!in(b)",
    "in()",
    "in(b,",
    "-b",
    "b c",
    "!!b",
    "(b)",
]


def _with(resources="", labels=""):
    return TEXT.replace("cpus: 2, gpus: 0, custom: {rack-a: 1}", resources or "cpus: 2").replace(
        "labels: {zone: east}", f"labels: {{{labels}}}"
    )


def _taken(text: str) -> bool:
    try:
        ClusterSpec.parse(text)
    except ConfigError:
        return False
    return True


def test_what_ray_would_refuse_is_refused_in_the_file_and_nothing_else():
    """Ray's own checks beside ours. Its core checks more: test_cluster_ray.py asks it."""
    options = pytest.importorskip("ray._common.ray_option_utils")
    from ray._private.accelerators import get_all_accelerator_resource_names
    from ray._private.label_utils import validate_label_key, validate_label_selector_value

    for amount in AMOUNTS:
        if amount <= 4096:
            ray_says = options._validate_resource_quantity("num_cpus", amount)
            assert _taken(_with(f"cpus: {amount:f}")) == (ray_says is None), amount
        for name in ("rack", *get_all_accelerator_resource_names() - {"GPU"}):
            ray_says = options._validate_resources({name: amount})
            ours = _taken(_with(f"custom: {{{name}: {amount:f}}}"))
            assert ours == (ray_says is None), (name, amount)
    for key in LABELS:
        assert _taken(_with(labels=f'"{key}": b')) == (validate_label_key(key) is None), key
    for value in SELECTORS:
        ray_says = validate_label_selector_value(value)
        assert _taken(_with(labels=f'a: "{value}"')) == (ray_says is None), value


def test_who_may_use_it(tmp_path: Path) -> None:
    """Files stand beside the YAML; a gateway gets prices and shares it can be sent with."""
    path = tmp_path / "cluster.yaml"
    path.write_text(
        TEXT
        + "auth: {keys: keys.yaml, jwt: {jwks: /etc/jwks, issuer: i, audience: a}}\n"
        + "prices: {tiny: {input: 0.5, output: 2}}\n"
    )
    spec = ClusterSpec.load(path)
    assert spec.auth.keys == str(tmp_path / "keys.yaml")
    assert spec.auth.jwt.jwks == "/etc/jwks"
    config = gateway_launch(spec, "gateway-1", 1, b"k" * 32, b"g" * 32).gateway
    assert config is not None
    assert pickle.loads(pickle.dumps(config)).prices["tiny"].output == 2
    assert (config.gateways, config.auth) == (2, spec.auth)
    assert config.probe_key not in repr(config)
    fewer = ClusterSpec.parse(path.read_text().replace("replicas: 2", "replicas: 1"), str(path))
    assert fewer.gateway_revision() != spec.gateway_revision(), "their shares change"
    assert ClusterSpec.parse(spec.to_yaml()) == spec


def test_bearer_tokens_need_issuer_and_audience() -> None:
    with pytest.raises(ConfigError, match=r"auth\.jwt\.issuer: is needed") as refused:
        ClusterSpec.parse(TEXT + "auth: {jwt: {jwks: /etc/jwks}}\n", "f")
    assert refused.value.where.startswith("f:")
