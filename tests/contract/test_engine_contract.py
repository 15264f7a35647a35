"""What every kind of engine holds to, and how kinds are named, chosen and kept apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_contract import (  # noqa: F401  (tests)
    continued,
    make,
    sequence,
    test_facts_layout_and_memory_agree,
    test_prompts_are_scored_alike_in_any_chunks_and_blocks,
    test_tokens_depend_on_the_prefix_and_on_the_kv_in_its_blocks,
)
from engines_kit import KEY, expected, simulated, start_engines
from gateway_rig import ask, collect, ids_of
from roles_kit import kv_of_tokens
from source_rules import ROOT, sources

from crossdock.deploy.runtime import worker_launch
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.contract import Engine
from crossdock.engine.profiles import Profile
from crossdock.engine.simulated import draw, weights
from crossdock.kvcache.sequence import Chunk, StepPlan
from crossdock.kvtransfer.layout import check_layouts, layout_hash
from crossdock.proto.errors import ConfigError, LayoutMismatch
from crossdock.proto.types import Role, SamplingParams
from crossdock.worker.config import WorkerConfig
from crossdock.worker.peer_calls import met

CONCRETE = ("crossdock.engine.native", "crossdock.engine.simulated", "crossdock.engine.vllm")


BLOCK = 8
PROMPT = [(7 * i) % 200 + 3 for i in range(2 * BLOCK + 5)]


@pytest.fixture(params=["native", "simulated"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Engine:
    return make(request.param, tiny_model)


@pytest.mark.parametrize("blocks", [(3, 9, 2, 5), (1, 3, 2, 5), (3, 3, 2, 5), (3, 0, 2, 5)])
def test_any_wrong_block_is_a_wrong_token(blocks: tuple[int, ...]) -> None:
    """One of equal tokens at equal positions but after others; two swapped; one twice; none."""
    engine = make("simulated", "simulated")
    other = sequence([9] * 8 + PROMPT[8:], 8, 9, 10, 11)
    continued(engine, other, 1)
    one = sequence(PROMPT, 3, 1, 2, 5)
    right = continued(engine, one, 1)
    one.block_table = list(blocks)
    ((token,),) = engine.run(StepPlan((Chunk(one, len(PROMPT) - 1, 1, True),)))
    assert token.token_id != right[0]


def test_nobody_imports_a_concrete_engine_but_its_own_package() -> None:
    """Nobody of the product; tests and benchmarks may."""
    found = []
    for path in sources():
        if path.is_relative_to(ROOT / "engine"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            names = [alias.name for alias in node.names] if imports else []
            dotted = {module, *names, *(f"{module}.{name}" for name in names if module)}
            if any(name.startswith(CONCRETE) for name in dotted):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_a_simulated_worker_needs_no_torch() -> None:
    code = """
import asyncio, sys
from crossdock.decode.role import create
from crossdock.proto.types import Role
from crossdock.worker.config import WorkerConfig, settings_of

async def main():
    worker = create(WorkerConfig(
        name="d", pool="d", role=Role.DECODE, model="simulated", cluster_key=b"k" * 16,
        transport="local", engine=settings_of("simulated")(),
    ))
    await worker.start()
    await worker.stop()
asyncio.run(main())
print(sorted({"torch", "numba", "nixl", "gguf", "transformers", "ray"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


# -- the kinds in the YAML -------------------------------------------------------------------------

YAML = """\
metadata: {name: sim}
model: {id: simulated}
pools:
  prefill:
    role: prefill
    engine: {kind: simulated, profile: cpu-135m}
  decode:
    role: decode
    engine:
      kind: simulated
      profile: {decode_s: 0.01}
kv: {transport: local, lease_s: 7}
"""

WRONG = [
    ("kind: simulated, profile", "kind: sglang, profile", 6, "pools.prefill.engine.kind", "native"),
    ("profile: cpu-135m", "profile: tpu", 6, "pools.prefill.engine.profile", "instant, cpu-135m"),
    ("profile: cpu-135m", "speed: 1", 6, "pools.prefill.engine.speed", "unknown field"),
    ("decode_s: 0.01", "decode_s: -1", 11, "pools.decode.engine.profile.decode_s", "from 0 to 60"),
    ("decode_s: 0.01", "decode: 1", 11, "pools.decode.engine.profile.decode", "decode_s?"),
    ("kind: simulated\n", "kind: native\n", 11, "pools.decode.engine.profile", "unknown field"),
    ("lease_s: 7", "dtype: fp8", 12, "kv.dtype", "auto, float32, bfloat16, float16"),
]  # fmt: skip


def test_an_engine_is_named_and_set_in_the_yaml() -> None:
    spec = ClusterSpec.parse(YAML)
    assert spec.pools["prefill"].engine.profile == Profile.NAMED["cpu-135m"]
    assert spec.pools["decode"].engine.profile == Profile(decode_s=0.01)
    assert ClusterSpec.parse(spec.to_yaml()) == spec
    config = worker_launch(spec, "decode", "decode-0", KEY).worker
    assert (config.engine, config.lease_s) == (spec.pools["decode"].engine, 7.0)
    assert (config.model, config.transport, config.kv_dtype) == ("simulated", "local", "auto")


@pytest.mark.parametrize("old, new, line, field, message", WRONG, ids=[w[1][:24] for w in WRONG])
def test_errors_name_line_and_field(
    old: str, new: str, line: int, field: str, message: str
) -> None:
    assert old in YAML
    with pytest.raises(ConfigError) as caught:
        ClusterSpec.parse(YAML.replace(old, new), "c.yaml")
    assert str(caught.value).startswith(f"c.yaml:{line}: {field}: ")
    assert message in str(caught.value)


def test_pools_that_hand_off_have_one_kind_of_engine() -> None:
    text = YAML.replace("id: simulated", "id: some-model")
    unlike = text.replace("{kind: simulated, profile: cpu-135m}", "{device: cpu}")
    message = r"c\.yaml:10: pools\.decode\.engine\.kind: 'simulated' .* 'native' of pools\.prefill"
    with pytest.raises(ConfigError, match=message):
        ClusterSpec.parse(unlike, "c.yaml")
    assert ClusterSpec.parse(unlike.replace("role: prefill", "role: colocated"), "c.yaml")


def test_the_model_without_weights_is_for_the_simulated_engine() -> None:
    text = YAML.replace("kind: simulated", "kind: native").replace(", profile: cpu-135m", "")
    text = text.replace("      profile: {decode_s: 0.01}\n", "")
    with pytest.raises(ConfigError, match=r"pools\.prefill\.engine\.kind: 'native' needs a model"):
        ClusterSpec.parse(text)
    with pytest.raises(ConfigError, match=r"model\.id: 'simulated' has no weights"):
        make("native", "simulated")


@pytest.mark.parametrize("field, value", [("max_batch", 0), ("verify", "hope"), ("lease_s", 0.0)])
def test_a_worker_is_checked_by_the_definitions_of_the_yaml(field: str, value: object) -> None:
    options = {"name": "w", "pool": "p", "role": Role.DECODE, "model": "m", "cluster_key": KEY}
    with pytest.raises(ConfigError, match=f"^{field}: {value!r} is not allowed"):
        WorkerConfig(**options, **{field: value})  # type: ignore[arg-type]


# -- unlike engines --------------------------------------------------------------------------------


def test_unlike_engines_have_unlike_layouts(tiny_model: Path) -> None:
    native, other = make("native", tiny_model).layout, make("simulated", tiny_model).layout
    assert layout_hash(native) != layout_hash(other)
    with pytest.raises(LayoutMismatch, match="engine is 'native' here and 'simulated' there"):
        check_layouts(native, other)


async def test_a_hand_off_between_unlike_engines_is_refused_with_both_named(
    tiny_model: Path,
) -> None:
    """Where the YAML could not know: workers of two rollouts."""
    prefill = start_engines(Role.PREFILL, model=str(tiny_model))
    native = start_engines(Role.DECODE, model=str(tiny_model), engine=simulated("native"))
    async with prefill as one, native as other:
        (p,), (d,) = one.workers, other.workers
        peer = p.endpoint
        with pytest.raises(Exception, match="engine is 'native' here and 'simulated' there"):
            await met(d.peers, bytes.fromhex(peer.incarnation), peer.address)


# -- the type of KV --------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype, size", [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_kv_has_a_type_of_its_own(tiny_model: Path, kv_dtype: str, size: int) -> None:
    engine = make("native", tiny_model, dtype="float32", kv_dtype=kv_dtype)
    assert engine.layout.dtype == kv_dtype
    assert engine.memory.block_bytes == 2 * 2 * 2 * 16 * BLOCK * size
    whole = make("native", tiny_model, dtype="float32")
    tokens = continued(engine, sequence(PROMPT, 3, 1, 2, 5), 2)
    assert tokens == continued(whole, sequence(PROMPT, 3, 1, 2, 5), 2)
    engine.warmup()


def test_a_type_of_kv_that_an_engine_has_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"kv\.dtype: 'float16' is no type of KV of a simul"):
        make("simulated", "simulated", kv_dtype="float16")


async def test_kv_of_half_the_size_is_handed_off(tiny_model: Path) -> None:
    native, prompt = simulated("native", device="cpu"), list(range(20, 70))
    seen = []
    for roles in ((Role.COLOCATED,), (Role.PREFILL, Role.DECODE)):
        options = {"model": str(tiny_model), "engine": native, "kv_dtype": "bfloat16"}
        async with start_engines(*roles, **options) as rig:
            call = rig.stub.Generate(ask(prompt, max_tokens=12, temperature=0.0, ignore_eos=True))
            responses = await collect(call)
            seen.append(ids_of(responses))
            blocks = responses[-1].timings.transferred_blocks
    assert seen[0] == seen[1] and blocks == 7


def test_what_is_expected_is_what_the_engine_draws() -> None:
    """The oracle of the tests is the function that the engine's tokens are defined by."""
    params = SamplingParams(temperature=0.0)
    kv = kv_of_tokens(PROMPT)
    seen, position = int((kv * weights(0, len(kv))).sum(dtype=np.uint64)), len(kv)
    assert expected(PROMPT, 1) == [draw(seen, position, params, 32).token_id]
    seeded = replace(params, temperature=1.0, seed=3)
    drawn = {draw(seen, position, replace(seeded, seed=s), 997).token_id for s in range(50)}
    assert len(drawn) > 40
