"""The contract: generated code is current, plain types hold to their limits, light stays light."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crossdock.proto
from crossdock.engine.native.philox import uniform
from crossdock.proto import errors
from crossdock.proto.convert import sampling_from_pb, sampling_to_pb
from crossdock.proto.hashing import HASH_BYTES, BlockHasher, hash_key
from crossdock.proto.settings import overlap
from crossdock.proto.types import SamplingParams

KEY = b"the key of these tests"
PROTO = Path(crossdock.proto.__path__[0])
GENERATE = Path(__file__).resolve().parents[3] / "tools" / "generate_proto.py"


def test_generated_code_is_current(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    # In a process of its own: protoc's library does not bear company.
    subprocess.run([sys.executable, str(GENERATE), str(tmp_path)], check=True)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 12
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
        ("max_tokens", -1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
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


@given(st.lists(st.integers(0, 2**31 - 1), max_size=70), st.integers(1, 17), st.integers(0, 70))
def test_block_hashes_are_chained(ids: list[int], size: int, known: int) -> None:
    """However many of a sequence's tokens were known when its hashes were begun."""
    hasher = BlockHasher(KEY, size)
    root = hasher.root(b"layout", b"salt")
    chain = hasher.chain(ids, root)
    assert len(chain) == len(ids) // size and all(len(each) == HASH_BYTES for each in chain)
    assert len({root, *chain}) == 1 + len(chain)
    grown = hasher.chain(ids[:known], root)
    hasher.extend(grown, ids, root)
    assert grown == chain
    packed = np.asarray(ids, dtype="<u4").tobytes()
    for parent, each in zip([root, *chain], chain, strict=False):
        assert hasher.block(parent, packed[: 4 * size]) == each
        packed = packed[4 * size :]


def test_a_change_anywhere_before_a_block_changes_its_hash() -> None:
    hasher, ids = BlockHasher(KEY, 16), list(range(48))
    root = hasher.root(b"layout")
    assert not set(hasher.chain(ids, root)) & set(hasher.chain([99, *ids[1:]], root))
    assert hasher.chain(ids, root)[:2] == hasher.chain(ids[:32], root)


def test_key_layout_and_salt_are_in_every_hash() -> None:
    others = [(KEY, b"layout", b""), (KEY[:-1], b"layout", b""), (KEY, b"other", b"")]
    others += [(KEY, b"layout", b"salt"), (KEY, b"layoutsalt", b""), (KEY, b"", b"layout")]
    seen = set()
    for key, identity, salt in others:
        hasher = BlockHasher(key, 16)
        root = hasher.root(identity, salt)
        seen |= {root, *hasher.chain(range(32), root), hasher.prompt(range(40), [], root)}
    assert len(seen) == 4 * len(others)


def test_a_prompt_is_bound_by_its_tail_its_length_and_its_block_hashes() -> None:
    hasher, ids = BlockHasher(KEY, 16), list(range(40))
    root = hasher.root(b"layout")
    chain = hasher.chain(ids, root)
    bound = hasher.prompt(ids, chain, root)
    assert bound == hasher.prompt(ids, [], root) == hasher.prompt(ids, [*chain, b"later"], root)
    others = [
        hasher.prompt([*ids[:-1], 7], chain, root),
        hasher.prompt([7, *ids[1:]], chain, root),
        hasher.prompt(ids[:-1], chain, root),
        hasher.prompt(ids, hasher.chain([7] * 40, root), root),
        hasher.prompt(ids, [], hasher.root(b"other")),
    ]
    assert len({bound, *others}) == 6


def test_the_key_of_the_hashes_does_not_say_the_clusters() -> None:
    assert hash_key(KEY) != hash_key(KEY + b"!") and KEY not in hash_key(KEY)
    assert repr(KEY) not in repr(BlockHasher(KEY, 16))
    with pytest.raises(ValueError, match="15 bytes"):
        BlockHasher(bytes(15), 16)


@pytest.mark.parametrize(
    ("modules", "banned"),
    [
        ("crossdock.proto.convert crossdock.proto.hashing", "torch ray nixl grpc numba"),
        ("crossdock.prefill.scheduler crossdock.decode.scheduler", "torch ray nixl grpc numba"),
        ("crossdock.prefill.role crossdock.decode.role", "torch ray nixl"),
        ("crossdock.model.store crossdock.model.text crossdock.model.config", "torch ray nixl"),
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


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("127.0.0.1:80", "0.0.0.0:80", True),
        ("127.0.0.1:80", "[::]:80", True),
        ("0.0.0.0:80", "[::]:80", True),
        ("127.0.0.1:80", "localhost:80", True),
        ("[::1]:80", "localhost:80", True),
        ("[::1]:80", "127.0.0.1:80", False),
        ("10.0.0.1:80", "localhost:80", False),
        ("localhost:80", "localhost:80", True),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("0.0.0.0:0", "127.0.0.1:0", False),
    ],
)
def test_addresses_that_no_two_servers_can_have(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) is overlap(other, one) is expected
