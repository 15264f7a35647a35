"""The contract: generated code is current, plain types hold to their limits, light stays light."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crossdock.proto
from crossdock.engine.native.philox import uniform
from crossdock.proto import errors
from crossdock.proto.convert import sampling_from_pb, sampling_to_pb
from crossdock.proto.hashing import HASH_BYTES, block_hash, chain_hashes, root_hash
from crossdock.proto.types import SamplingParams

PROTO = Path(crossdock.proto.__path__[0])


def test_generated_code_is_current(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    # In a process of its own: protoc's library does not bear company.
    subprocess.run([sys.executable, str(PROTO / "generate.py"), str(tmp_path)], check=True)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 9
    for file in made:
        assert file.read_text() == (PROTO / "v1" / file.name).read_text(), file.name


def error_types(kind: type[errors.CrossdockError] = errors.CrossdockError):
    yield kind
    for child in kind.__subclasses__():
        yield from error_types(child)


def test_every_error_has_its_statuses_and_stands_in_the_tree() -> None:
    for kind in error_types():
        assert kind.grpc_status in grpc.StatusCode.__members__
        assert 400 <= kind.http_status < 600
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in (errors.__doc__ or "")


def test_errors_name_field_value_and_limit() -> None:
    error = errors.InvalidRequest("top_p", 1.5, "must be in (0, 1]")
    assert str(error) == "top_p: 1.5 is not allowed; must be in (0, 1]"
    assert len(str(errors.InvalidRequest("prompt", "x" * 10_000, "is too long"))) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 10.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(301), 0.0)),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", tuple(range(65))),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", ("x",) * 1000),
        ("seed", -(2**63) - 1),
        ("seed", 2**64),
        pytest.param("seed", 10**400, id="seed-huge"),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        SamplingParams(**{field: value}).validate(vocab_size=100)  # type: ignore[arg-type]
    assert caught.value.field.startswith(field)


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(
        temperature=0.0,
        top_p=1.0,
        min_p=1.0,
        repetition_penalty=10.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias={0: -100.0, 99: 100.0},
        stop_token_ids=(0, 99),
        stop=("x" * 256,) * 16,
        seed=2**64 - 1,
        max_tokens=1,
        min_tokens=1,
        logprobs=20,
    ).validate(vocab_size=100)


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 5),
        top_p=st.floats(0.01, 1),
        logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
        stop=st.lists(st.text(max_size=5), max_size=2).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=2).map(tuple),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.none() | st.integers(0, 20),
        ignore_eos=st.booleans(),
    )
)
def test_sampling_parameters_survive_the_wire(params: SamplingParams) -> None:
    assert sampling_from_pb(sampling_to_pb(params)) == params


@pytest.mark.parametrize("seed", [-1, -(2**63)])
def test_a_negative_seed_is_its_64_bits(seed: int) -> None:
    given = SamplingParams(seed=seed)
    given.validate(vocab_size=100)
    sent = sampling_from_pb(sampling_to_pb(given))
    assert sent.seed == 2**64 + seed
    assert uniform(sent.seed, 7) == uniform(seed, 7)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=70), st.integers(1, 17))
def test_block_names_are_chained(ids: list[int], size: int) -> None:
    names = chain_hashes(ids, size, b"salt")
    assert len(names) == len(ids) // size and all(len(name) == HASH_BYTES for name in names)
    parent = root_hash(b"salt")
    for index, name in enumerate(names):
        parent = block_hash(parent, ids[index * size : (index + 1) * size])
        assert name == parent
    assert not set(names) & set(chain_hashes(ids, size, b"other salt"))


def test_a_change_anywhere_before_a_block_changes_its_name() -> None:
    ids = list(range(48))
    changed = [99, *ids[1:]]
    assert not set(chain_hashes(ids, 16)) & set(chain_hashes(changed, 16))
    assert chain_hashes(ids, 16)[:2] == chain_hashes(ids[:32], 16)


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        ("crossdock.proto.convert crossdock.proto.hashing", "torch ray nixl grpc numba"),
        ("crossdock.prefill.scheduler crossdock.decode.scheduler", "torch ray nixl grpc numba"),
        ("crossdock.prefill.role crossdock.decode.role", "torch ray nixl"),
        ("crossdock.router.gateway", "torch ray nixl"),
        ("crossdock.deploy.spec crossdock.deploy.reconcile", "torch ray nixl"),
        ("crossdock.deploy.controller crossdock.deploy.admin", "torch ray nixl"),
        ("crossdock crossdock.client", "torch ray nixl numba"),
    ],
)
def test_light_modules_stay_light(modules: str, banned: str) -> None:
    """Nothing heavy comes along, not even indirectly."""
    code = f"import sys, {', '.join(modules.split())}\n"
    code += f"print(*(name for name in {banned.split()} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
