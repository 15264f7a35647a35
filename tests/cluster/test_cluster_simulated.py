"""deploy/manifests/simulated.yaml on a real Ray, with fewer workers: no model, no torch."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from pathlib import Path

import pytest
from engines_kit import expected
from ray_kit import serving

from crossdock.client import Client
from crossdock.deploy import admin
from crossdock.proto.errors import NotFound

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "manifests" / "simulated.yaml"


def test_the_manifest_serves_without_a_model(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    text = MANIFEST.read_text().replace("replicas: 8", "replicas: 2")
    text = text.replace("name: simulated}", f"name: simulated-{os.getpid()}}}")
    text = text.replace(":50051", ":0").replace(":8000", ":0").replace(":50050", f":{port}")
    (tmp_path / "c.yaml").write_text(text)
    with serving(tmp_path / "c.yaml") as cluster:
        prompt = list(range(40, 140))
        with Client(cluster.grpc) as client:
            result = client.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True)
        assert list(result.token_ids) == expected(prompt, 20)
        body = {"model": "simulated", "messages": [{"role": "user", "content": "Are you there?"}]}
        request = urllib.request.Request(
            f"http://{cluster.http}/v1/chat/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            told = json.load(answer)
        assert told["choices"][0]["message"]["content"].isascii()
        found = admin.explain(told["id"], cluster.admin)
        [sequence] = found.sequences
        [placement] = sequence.placements
        assert f"chatcmpl-{found.request_id}" == told["id"] and not found.running
        assert {each.worker for each in placement.computing} == {"prefill-0", "prefill-1"}
        assert {each.worker for each in placement.decoding} == {"decode-0", "decode-1"}
        assert sequence.timings.prefill_worker == placement.prefill
        assert sequence.timings.decode_worker == placement.decoded_on == placement.decode
        assert sequence.generated_tokens == told["usage"]["completion_tokens"]
        with pytest.raises(NotFound, match="is not known to gateway-0: it is"):
            admin.explain("nobody's", cluster.admin)
        workers = admin.status(cluster.admin).workers
        assert sorted(w.pool for w in workers) == ["decode"] * 2 + ["prefill"] * 2
        for worker in workers:
            mapped = Path(f"/proc/{worker.pid}/maps").read_text()
            assert "libtorch" not in mapped and "llvmlite" not in mapped and "nixl" not in mapped
