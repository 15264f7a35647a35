"""Two tiny models in one cluster on a real Ray, each with a prefill and a decode worker: one with
weights, one simulated. The second comes, loses its workers and goes while the gateway runs."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from engines_kit import expected
from ray_kit import free_port, serving

from crossdock.client import Client
from crossdock.deploy import admin
from crossdock.deploy.up import Cluster
from crossdock.proto.errors import NotFound

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SMALL = """
metadata: {{name: models-{pid}}}
models:
  small: {{id: "{model}", aliases: [s]}}
{large}gateway: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", drain_s: 2}}
controller: {{grpc: "127.0.0.1:{admin}"}}
kv: {{transport: local}}
pools:
  small-p: {{role: prefill, model: small, kv_memory_mb: 8, resources: {{cpus: 0.1}}}}
  small-d: {{role: decode, model: small, kv_memory_mb: 8, resources: {{cpus: 0.1}}}}
"""
LARGE = """\
  large: {id: simulated, aliases: [l]}
routes:
  auto:
    - {use: large, when: {prompt_tokens: {above: 60}}, fallback: [small]}
    - use: small
"""
LARGE_POOLS = """\
  large-p: {role: prefill, model: large, resources: {cpus: 0.1}, engine: {kind: simulated}}
  large-d: {role: decode, model: large, resources: {cpus: 0.1}, engine: {kind: simulated}}
"""
SHORT, LONG = list(range(10, 40)), list(range(10, 110))


def test_a_second_model_comes_and_goes(tiny_model: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {"pid": os.getpid(), "model": tiny_model, "admin": free_port()}
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(SMALL.format(large="", **known))
    two.write_text(SMALL.format(large=LARGE, **known) + LARGE_POOLS)
    with serving(one) as cluster, Client(cluster.grpc) as client:
        gateway = gateway_pid(cluster)
        assert complete(cluster, "s", SHORT)["model"] == "small"
        with pytest.raises(NotFound):
            client.generate(SHORT, model="large", max_tokens=1)

        assert admin.apply(two, cluster.admin).converged
        assert {w.pool: w.model for w in admin.status(cluster.admin).workers} == {
            "small-p": "small", "small-d": "small", "large-p": "large", "large-d": "large"
        }  # fmt: skip
        result = client.generate(LONG, model="l", max_tokens=20, temperature=0, ignore_eos=True)
        assert (result.model, list(result.token_ids)) == ("large", expected(LONG, 20))
        assert complete(cluster, "large", LONG)["model"] == "large"
        for prompt, model in ((SHORT, "small"), (LONG, "large")):
            assert client.generate(prompt, model="auto", max_tokens=2).model == model
            assert complete(cluster, "auto", prompt)["model"] == model
        fall_back(cluster, client)

        assert admin.apply(one, cluster.admin).converged
        assert gateway_pid(cluster) == gateway, "the gateway went on"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            complete(cluster, "large", LONG)
        assert complete(cluster, "small", LONG)["model"] == "small"


def fall_back(cluster: Cluster, client: Client) -> None:
    """The long prompts of `auto` are served by the other model while the first has no decode
    worker. A new one comes soon: where it was there before the question, it is killed as well."""
    for _ in range(10):
        assert admin.apply(two_of(cluster), cluster.admin).converged
        (victim,) = [w for w in admin.status(cluster.admin).workers if w.pool == "large-d"]
        os.kill(victim.pid, signal.SIGKILL)
        with triton.InferenceServerClient(cluster.grpc) as kserve:
            while kserve.is_model_ready("large"):
                pass
        if client.generate(LONG, model="auto", max_tokens=2).model == "small":
            return
    pytest.fail("the fallback was never taken")


def two_of(cluster: Cluster) -> Path:
    return Path(cluster.path).with_name("two.yaml")


def gateway_pid(cluster: Cluster) -> int:
    (gateway,) = admin.status(cluster.admin).gateways
    return gateway.pid


def complete(cluster: Cluster, model: str, prompt: list[int]) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 2}
    request = urllib.request.Request(
        f"http://{cluster.http}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        assert answer.headers["x-crossdock-model"] in ("small", "large")
        return json.load(answer)
