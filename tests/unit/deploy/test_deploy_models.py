"""Several models in one cluster: what the YAML may say, and what becomes of it."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
from controller_kit import FakeCluster, running, until

from crossdock.deploy.reconcile import Do, Losses, Member, State, Target, reconcile
from crossdock.deploy.runtime import Membership, gateway_launch, worker_launch
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError
from crossdock.router.serving import Range, Rule, ServedModel, When

YAML = """\
metadata: {name: two}
models:
  small: {id: simulated, aliases: [s, gpt-4o-mini]}
  Org/Large-2.5: {id: simulated, tool_parser: hermes}
routes:
  auto:
    - use: Org/Large-2.5
      when: {prompt_tokens: {above: 2000}, tenant: [acme], header: {x-tier: gold}}
      fallback: [small]
      max_wait_s: 5
    - use: small
gateway: {grpc: "127.0.0.1:0", http: "127.0.0.1:0"}
controller: {grpc: "127.0.0.1:0"}
pools:
  prefill: {role: prefill, model: small, engine: {kind: simulated}}
  decode: {role: decode, model: small, engine: {kind: simulated}}
  both: {role: colocated, model: Org/Large-2.5, engine: {kind: simulated}}
"""
SMALL_ALONE = """\
metadata: {name: two}
models: {small: {id: simulated}}
gateway: {grpc: "127.0.0.1:0", http: "127.0.0.1:0"}
controller: {grpc: "127.0.0.1:0"}
pools:
  prefill: {role: prefill, model: small, engine: {kind: simulated}}
  decode: {role: decode, model: small, engine: {kind: simulated}}
"""
KEY = bytes(32)


def test_it_is_read_whole_and_written_again() -> None:
    spec = ClusterSpec.parse(YAML)
    assert spec.serving.models == {
        "small": ServedModel("simulated", ("s", "gpt-4o-mini")),
        "Org/Large-2.5": ServedModel("simulated", tool_parser="hermes"),
    }
    when = When(Range(above=2000), ("acme",), {"x-tier": "gold"})
    assert spec.serving.routes == {
        "auto": (Rule("Org/Large-2.5", when, ("small",), 5.0), Rule("small"))
    }
    assert ClusterSpec.parse(spec.to_yaml()) == spec


def test_launches_say_the_model() -> None:
    spec = ClusterSpec.parse(YAML)
    launch = worker_launch(spec, "both", "both-0", KEY)
    assert launch.model == "Org/Large-2.5"
    assert launch.worker is not None and launch.worker.model == "simulated"
    gateway = gateway_launch(spec, "gateway-0", 0, KEY, KEY).gateway
    assert gateway is not None and gateway.first_serving == spec.serving
    told = Membership([], spec.serving)
    for sent in (launch, gateway, told):
        assert pickle.loads(pickle.dumps(sent)) == sent, "it goes to another process"
    one = ClusterSpec.parse(
        "metadata: {name: one}\nmodel: {id: simulated}\n"
        "pools: {c: {role: colocated, engine: {kind: simulated}}}"
    )
    gateway = gateway_launch(one, "gateway-0", 0, KEY, KEY).gateway
    assert gateway is not None and gateway.first_serving.models == {"": ServedModel("simulated")}


def test_a_path_is_taken_from_the_files_folder(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(YAML.replace("small: {id: simulated,", "small: {id: ./tiny,").replace(
        "model: small, engine: {kind: simulated}", "model: small"))  # fmt: skip
    assert ClusterSpec.load(file).models["small"].id == str(tmp_path / "tiny")


WRONG = [
    ("models:", "model: {id: x}\nmodels:", 3, "models", "there is model as well"),
    ("aliases: [s, gpt-4o-mini]", "aliases: [s, s]", 3, r"models\.small\.aliases\[1\]",
     "'s' is an alias of 'small' already"),
    ("aliases: [s, gpt-4o-mini]", "aliases: [Org/Large-2.5]", 3, r"models\.small\.aliases\[0\]",
     "is a model already"),
    ("aliases: [s, gpt-4o-mini]", "aliases: s", 3, r"models\.small\.aliases", "must be a list"),
    ("aliases: [s, gpt-4o-mini]", "aliases: [1]", 3, r"models\.small\.aliases\[0\]", "a string"),
    ("aliases: [s, gpt-4o-mini]", "aliases: ['a b']", 3, r"models\.small\.aliases\[0\]",
     "must be 1 to 128 of letters"),
    ("tool_parser: hermes", "tool_parser: own", 4, r"models\.Org/Large-2\.5\.tool_parser",
     "one of"),
    ("routes:\n", "prices: {s: {output: 1}}\nroutes:\n", 5, r"prices\.s",
     "is an alias of 'small'; one of small, Org/Large-2.5"),
    ("routes:\n", "prices: {x: {output: 1}}\nroutes:\n", 5, r"prices\.x", "not among models"),
    ("  auto:\n", "  s:\n", 6, r"routes\.s", "is an alias of 'small' already"),
    ("use: Org/Large-2.5", "use: medium", 7, r"routes\.auto\[0\]\.use", "not among models"),
    ("fallback: [small]", "fallback: [small, s]", 9, r"routes\.auto\[0\]\.fallback\[1\]",
     "'s' is not among models; one of small, Org/Large-2.5"),
    ("fallback: [small]", "fallback: [Org/Large-2.5]", 7, r"routes\.auto\[0\]\.use",
     "is there twice"),
    ("    - use: small\n", "    - {use: small, when: {tenant: [a]}}\n", 11,
     r"routes\.auto\[1\]\.when", "the last rule is for all others"),
    ("    - use: small\n", "    - use: small\n    - use: small\n", 11, r"routes\.auto\[1\]",
     "no rule after it is ever used"),
    ("{above: 2000}", "{above: 2000, below: 2001}", 8,
     r"routes\.auto\[0\]\.when\.prompt_tokens\.below", "no length is above 2000"),
    ("{x-tier: gold}", "{'x tier': gold}", 8, r"routes\.auto\[0\]\.when\.header",
     "not the name of a header"),
    ("max_wait_s: 5", "max_wait_s: -1", 10, r"routes\.auto\[0\]\.max_wait_s", "from 0 to 86400"),
    ("max_wait_s: 5", "wait_s: 5", 10, r"routes\.auto\[0\]\.wait_s", "did you mean max_wait_s"),
    ("role: decode, model: small", "role: decode", 16, r"pools\.decode\.model",
     "is missing; one of small"),
    ("role: decode, model: small", "role: decode, model: s", 16, r"pools\.decode\.model",
     "not among models"),
    ("role: decode, model: small", "role: decode, model: Org/Large-2.5", 14, "pools",
     r"'small' could not be served: .*1 prefill, 0 decode"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "field", "message"), WRONG)
def test_what_cannot_be_is_named(old: str, new: str, line: int, field: str, message: str) -> None:
    assert YAML.count(old) == 1
    with pytest.raises(ConfigError, match=rf"c\.yaml:{line}: {field}.*: .*{message}"):
        ClusterSpec.parse(YAML.replace(old, new), "c.yaml")


def test_one_model_has_neither_routes_nor_pools_by_model() -> None:
    one = "metadata: {name: one}\nmodel: {id: simulated}\n"
    pools = "pools: {c: {role: colocated, engine: {kind: simulated}%s}}\n"
    with pytest.raises(ConfigError, match=r"pools\.c\.model: 'm' is not allowed; the cluster has"):
        ClusterSpec.parse(one + pools % ", model: m")
    with pytest.raises(ConfigError, match=r"routes\.auto: is not allowed; the cluster has one"):
        ClusterSpec.parse(one + pools % "" + "routes: {auto: [{use: x}]}")
    with pytest.raises(ConfigError, match=r"model\.id: must not be empty; a model, or several"):
        ClusterSpec.parse("metadata: {name: one}\n" + pools % "")


def test_names_alone_replace_nobody() -> None:
    """Aliases, routes and models that come are told to gateways, which go on with their ports."""
    spec = ClusterSpec.parse(YAML)
    other = ClusterSpec.parse(YAML.replace("[s, gpt-4o-mini]", "[t]").replace("2000", "3000"))
    assert other.serving != spec.serving
    assert other.gateway_revision() == spec.gateway_revision()
    assert [other.pool_revision(p) for p in spec.pools] == [
        spec.pool_revision(p) for p in spec.pools
    ]


async def test_gateways_are_told_of_models_while_they_run(tmp_path: Path) -> None:
    store = ClusterStore("two", tmp_path)
    spec = ClusterSpec.parse(YAML)
    store.begin(spec.to_yaml(), "life")
    cluster = FakeCluster()
    async with running(cluster, store) as controller:
        await until(lambda: controller.converged)
        (gateway,) = cluster.alive("gateway")
        assert gateway.serving == spec.serving
        assert {m.name: m.model for m in gateway.members} == {
            "prefill-0": "small", "decode-0": "small", "both-0": "Org/Large-2.5"
        }  # fmt: skip
        assert all(p.serving is None for p in cluster.alive("both")), "workers need not know"
        typed = YAML.replace("small: {id: simulated,", "small: {id: simulated, dtype: float32,")
        with pytest.raises(ConfigError, match=r"models\.small\.dtype: cannot change from 'auto'"):
            controller.apply(ClusterSpec.parse(typed))
        third = YAML.replace("models:\n", "models:\n  third: {id: simulated}\n") + (
            "  third: {role: colocated, model: third, engine: {kind: simulated}}\n"
        )
        await controller.change(lambda _: ClusterSpec.parse(third), "apply")
        await until(lambda: controller.converged)
        assert cluster.alive("gateway") == [gateway], "it goes on"
        assert list(gateway.serving.models) == ["third", "small", "Org/Large-2.5"]
        one = ClusterSpec.parse(SMALL_ALONE)
        prefilling = cluster.alive("both")[0]
        prefilling.busy.set()
        await controller.change(lambda _: one, "apply")
        await until(lambda: prefilling.draining)
        assert list(gateway.serving.models) == ["small"], "told before its workers leave"
        prefilling.busy.clear()
        await until(lambda: controller.converged)
        assert not prefilling.cut_off
        assert {p.launch.pool for p in cluster.processes if p.alive} == {
            "gateway", "prefill", "decode"
        }  # fmt: skip


def members(*places: tuple[str, str, str, str, State]) -> list[Member]:
    return [
        Member(name, pool, role, revision, state, model=pool[0])
        for name, pool, role, revision, state in places
    ]


READY, DRAINING = State.READY, State.DRAINING


def test_ready_workers_of_another_model_spare_nobody() -> None:
    """`a` is being replaced and its new worker is not there yet; `b` has one more than wanted."""
    targets = [Target("a", "colocated", 1, "new", model="a"),
               Target("b", "colocated", 1, "r", model="b")]  # fmt: skip
    there = members(
        ("a-0", "a", "colocated", "old", READY),
        ("a-1", "a", "colocated", "new", State.STARTING),
        ("b-0", "b", "colocated", "r", READY),
        ("b-1", "b", "colocated", "r", READY),
    )
    actions = reconcile(targets, there, {}, time.monotonic())
    assert [(a.do, a.pool) for a in actions] == [(Do.DRAIN, "b")]


def test_of_a_model_that_goes_decode_workers_are_last() -> None:
    targets = [Target("b", "colocated", 1, "r", model="b")]
    rest = [("b-0", "b", "colocated", "r", READY), ("ad-0", "ad", "decode", "r", READY)]
    for prefill, expected in ((READY, ["ap-0"]), (DRAINING, []), (None, ["ad-0"])):
        places = [*rest, *([("ap-0", "ap", "prefill", "r", prefill)] if prefill else [])]
        there = members(*places)
        for member in there:
            member.drain_deadline = 1e12
        actions = reconcile(targets, there, dict[str, Losses](), 0.0)
        assert [a.name for a in actions if a.do is Do.DRAIN] == expected
