"""The API page: its examples run as printed, its tables say what the code says."""

from __future__ import annotations

import asyncio
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from fake_worker import FakeWorker
from grpc_health.v1 import health_pb2, health_pb2_grpc

from crossdock.proto import errors, types
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.gateway import GatewayConfig, GatewayServer

DOCS = Path(__file__).resolve().parents[2] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Example:
    line: int
    language: str
    needs: str
    code: str


def examples(text: str) -> list[Example]:
    """Fenced blocks whose info string is `LANGUAGE test [NEEDS]`."""
    found = re.finditer(r"^```(\w+) test ?(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        Example(text.count("\n", 0, block.start()) + 1, block[1], block[2], block[3])
        for block in found
    ]


@dataclass(frozen=True)
class Served:
    grpc: str
    http: str


async def serve(model: Path, up: queue.Queue[Served], done: asyncio.Event) -> None:
    """A real gateway before two workers in miniature, until `done`."""
    config = GatewayConfig(
        "gateway-0", str(model), b"k" * 16, grpc="127.0.0.1:0", http="127.0.0.1:0"
    )
    server = GatewayServer(config)
    prefill, decode = FakeWorker("prefill-0", Role.PREFILL), FakeWorker("decode-0", Role.DECODE)
    async with prefill, decode:
        await server.start()
        try:
            await server.update_members([prefill.endpoint, decode.endpoint])
            up.put(Served(server.grpc_address, server.http_address))
            await done.wait()
        finally:
            await server.stop()


@pytest.fixture(scope="module")
def gateway(tiny_model: Path) -> Iterator[Served]:
    up: queue.Queue[Served] = queue.Queue()
    loop, done = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(tiny_model, up, done),))
    thread.start()
    try:
        served = up.get(timeout=60)
        wait_until_serving(served.grpc)
        yield served
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


def wait_until_serving(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=60
        )
        next(each for each in watch if each.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.slow
@pytest.mark.parametrize("example", examples(API), ids=lambda each: f"api.md:{each.line}")
def test_an_example_runs_as_printed(example: Example, gateway: Served) -> None:
    if example.needs == "curl" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    code = example.code.replace("127.0.0.1:50051", gateway.grpc)
    code = code.replace("127.0.0.1:8000", gateway.http)
    code = code.replace("smollm2-135m-instruct", "")  # whichever it is
    if example.language == "python":
        command = [sys.executable, "-c", code]
    else:
        code = code.replace("crossdock ", f"{sys.executable} -m crossdock.cli ")
        command = ["bash", "-euo", "pipefail", "-c", code]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "CROSSDOCK_TARGET": gateway.grpc},
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert ran.stdout.strip()
    assert "Traceback" not in ran.stderr


def test_there_are_examples_of_every_kind() -> None:
    kinds = {(each.language, each.needs) for each in examples(API)}
    python = {("python", needs) for needs in ("", "openai", "triton")}
    assert kinds == python | {("sh", ""), ("sh", "curl")}


def tree(kind: type[errors.CrossdockError]) -> Iterator[type[errors.CrossdockError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


def test_the_error_table_is_the_error_tree() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([A-Z_]+) \| (\d+) \| (yes|no) \|", API, re.MULTILINE)
    documented = {name: (status, int(http), again == "yes") for name, status, http, again in rows}
    ours = [kind for kind in tree(errors.CrossdockError) if kind.__module__ == errors.__name__]
    assert documented == {
        kind.__name__: (kind.grpc_status, kind.http_status, kind.retriable)
        for kind in ours
        if kind not in (errors.ConfigError, errors.Overtaken)  # of files and specs, not of requests
    }


@pytest.mark.parametrize(
    "message", [pb.GenerateRequest, pb.SamplingParams, pb.GenerateResponse, pb.Usage, pb.Timings]
)
def test_every_field_is_documented(message: type) -> None:
    page = API.split("## gRPC")[1].split("## HTTP")[0]
    for field in message.DESCRIPTOR.fields:  # type: ignore[attr-defined]
        assert f"`{field.name}`" in page or field.name in ("logprobs", "request_id"), field.name


@pytest.mark.parametrize(
    "limit",
    [
        f"at most {types.MAX_LOGIT_BIAS} entries",
        f"at most {types.MAX_STOP_STRINGS} texts of 1 to {types.MAX_STOP_CHARACTERS} characters",
        f"at most {types.MAX_STOP_TOKEN_IDS} |",
        f"0 to {types.MAX_LOGPROBS} alternatives",
        f"1 to {types.MAX_N};",
    ],
)
def test_limits_are_those_of_the_code(limit: str) -> None:
    assert limit in API


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_a_decision_stands_once() -> None:
    text = (DOCS / "decisions.md").read_text(encoding="utf-8")
    titles = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
    assert titles and len(titles) == len(set(titles))
