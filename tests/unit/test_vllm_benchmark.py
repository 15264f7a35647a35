"""vLLM's two servers, the proxy before them, and the model that peers of benchmarks are given."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from gguf import GGMLQuantizationType
from tiny import make_tiny_model, write_gguf

from crossdock.proto.errors import Unavailable

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KEPT = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]]}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def server(bodies: list[tuple[dict[str, Any], str]], answer: web.Response) -> TestServer:
    """Keeps what it is asked, with the request's id."""

    async def complete(request: web.Request) -> web.Response:
        bodies.append((await request.json(), request.headers["X-Request-Id"]))
        return answer

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    return TestServer(app)


async def test_a_prompt_goes_through_both_servers() -> None:
    from vllm_proxy import TO_DECODE, Proxy

    asked: list[tuple[dict[str, Any], str]] = []
    streamed = web.Response(text="data: {}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
    async with (
        server(asked, web.json_response({"kv_transfer_params": KEPT})) as prefill,
        server(asked, streamed) as decode,
        TestServer(Proxy(str(prefill.make_url("")), str(decode.make_url(""))).app()) as proxy,
        ClientSession() as session,
    ):
        body = {"prompt": [5], "max_tokens": 8, "stream": True, "stream_options": {"x": True}}
        async with session.post(proxy.make_url("/v1/completions"), json=body) as answer:
            assert answer.content_type == "text/event-stream"
            assert await answer.text() == streamed.text
    (first, its_id), (second, same_id) = asked
    assert first == {
        "prompt": [5],
        "max_tokens": 1,
        "stream": False,
        "kv_transfer_params": TO_DECODE,
    }
    assert second == body | {"kv_transfer_params": KEPT}
    assert its_id == same_id


def test_a_server_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    from vllm_disaggregated import started

    command = [sys.executable, "-c", "import sys; sys.exit('no module named uvicorn')"]
    with (
        started(command, tmp_path / "prefill") as server,
        pytest.raises(
            RuntimeError, match=r"^prefill ended with status 1:\nno module named uvicorn"
        ),
    ):
        server.await_ready("http://127.0.0.1:1/", 300.0)


def test_a_turn_begins_when_the_cluster_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm_disaggregated as benchmark
    from clusters import Cluster

    states = [Unavailable("no controller"), SimpleNamespace(converged=False)]
    states += [SimpleNamespace(converged=True)]
    status = Mock(side_effect=states)
    monkeypatch.setattr(benchmark.admin, "status", status)
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)
    benchmark.await_whole(Cluster("grpc", "http", "admin", 1.0))
    assert status.call_args_list == [call("admin")] * 3


def test_a_peer_is_given_a_whole_model_and_a_pace(tmp_path: Path) -> None:
    from gateway_cpu import STEP_S
    from gateway_peer import write_peer_model

    source = tmp_path / "tiny.gguf"
    write_gguf(make_tiny_model(tmp_path / "hf", "qwen3"), source, GGMLQuantizationType.F32)
    for _ in range(2):  # the second in the place of the first
        write_peer_model(str(source), tmp_path, tmp_path / "peer")
    names = {path.name for path in (tmp_path / "peer").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "pace.npz"} <= names
    assert (
        np.load(tmp_path / "peer" / "pace.npz")["decode_itl"].tolist() == [[1000 * STEP_S] * 2] * 2
    )
