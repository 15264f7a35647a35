"""The API page: its examples run as printed, its tables say what the code says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from stand_in import StandIn

from crossdock.proto import errors, types
from crossdock.proto.v1 import inference_pb2 as pb

DOCS = Path(__file__).resolve().parent.parent / "docs"
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


@pytest.fixture(scope="module")
def gateway() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.mark.parametrize("example", examples(API), ids=lambda each: f"api.md:{each.line}")
def test_an_example_runs_as_printed(example: Example, gateway: StandIn) -> None:
    if example.needs == "curl" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    code = example.code.replace("127.0.0.1:50051", gateway.target)
    code = code.replace("http://127.0.0.1:8000", gateway.url)
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
        env={"PATH": "/usr/bin:/bin", "CROSSDOCK_TARGET": gateway.target},
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert ran.stdout.strip()
    assert "Traceback" not in ran.stderr


def test_there_are_examples_of_every_kind() -> None:
    kinds = {(each.language, each.needs) for each in examples(API)}
    assert kinds == {("python", ""), ("python", "openai"), ("sh", ""), ("sh", "curl")}


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
        if kind is not errors.ConfigError  # of files, never of requests
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
