from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_kit import run
from fake_server import FakeServer
from typer.testing import CliRunner

from crossdock.cli import app

COMMANDS = [
    *("generate", "chat", "status", "doctor", "model", "up", "apply", "scale", "down"),
    *("bench", "bench-trace"),
]


@pytest.fixture
def gateway() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def test_help_lists_every_command_without_the_heavy_parts() -> None:
    script = (
        "import sys\n"
        "import typer.rich_utils\n"
        "frame = len(sys.modules)\n"
        "from crossdock.cli import main\n"
        "code = main(['--help'])\n"
        "assert code == 0\n"
        "assert not {'torch', 'ray', 'grpc', 'numpy', 'aiohttp', 'nixl'} & set(sys.modules)\n"
        "assert len(sys.modules) - frame < 100, sorted(sys.modules)\n"  # little beside typer's
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    for command in COMMANDS:
        assert f" {command} " in shown.stdout


def test_the_installed_command_prints_its_version() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "crossdock.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert shown.stdout.startswith("crossdock ")


def test_generate_streams_the_answer(gateway: FakeServer, capsys: Any) -> None:
    code, out, err = run(capsys, "generate", "hi", "--target", gateway.target, "--max-tokens", "3")
    assert (code, out, err) == (0, " 0 1 2\n", "")
    request = gateway.requests[0]
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "hi")]
    assert not request.sampling.HasField("temperature")


def test_generate_raw_sends_the_text_and_its_options(gateway: FakeServer, capsys: Any) -> None:
    options = ["--raw", "--no-stream", "--temperature", "0", "--seed", "7"]
    options += ["--stop", "a", "--stop", "b", "--top-k", "5"]
    code, out, _ = run(capsys, "generate", "hi", "--target", gateway.target, *options)
    assert (code, out) == (0, " 0 1 2\n")
    request = gateway.requests[0]
    assert request.text == "hi"
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 7)
    assert list(request.sampling.stop) == ["a", "b"]
    assert request.sampling.top_k == 5


def test_generate_json_and_several_continuations(gateway: FakeServer, capsys: Any) -> None:
    code, out, _ = run(capsys, "generate", "hi", "--target", gateway.target, "--json", "-n", "2")
    answer = json.loads(out)
    assert code == 0
    assert [each["token_ids"] for each in answer["completions"]] == [[100, 101, 102]] * 2
    assert answer["completions"][0]["finish_reason"] == "length"
    _, out, _ = run(capsys, "generate", "hi", "--target", gateway.target, "-n", "2")
    assert out == "--- 0\n 0 1 2\n--- 1\n 0 1 2\n"


def test_generate_reads_standard_input(gateway: FakeServer) -> None:
    arguments = ["generate", "-", "--raw", "--target", gateway.target]
    assert CliRunner().invoke(app, arguments, input="from a pipe").exit_code == 0
    assert gateway.requests[0].text == "from a pipe"


def test_chat_keeps_the_history_until_reset(gateway: FakeServer) -> None:
    said = "one\n\ntwo\n/reset\nthree\n/exit\nnever\n"
    arguments = ["chat", "--target", gateway.target, "--system", "be brief"]
    ended = CliRunner().invoke(app, arguments, input=said)
    assert ended.exit_code == 0, ended.output
    assert ended.output == " 0 1 2\n" * 3
    talks = [[m.content for m in request.chat.messages] for request in gateway.requests]
    assert talks == [
        ["be brief", "one"],
        ["be brief", "one", " 0 1 2", "two"],
        ["be brief", "three"],
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "hi", "--target", "127.0.0.1:1"], 1, "failed to connect"),
        (["generate", "hi", "--target", "nope"], 2, "host:port"),
        (["generate", "hi", "--max-tokens", "0"], 2, "max-tokens"),
        (["generate", "hi", "--raw", "--system", "x"], 2, "--raw"),
        (["generate"], 2, "prompt"),
        (["nonsense"], 2, "nonsense"),
        (["bench", "--rate", "1", "--concurrency", "2"], 2, "not both"),
        (["bench", "--slo", "ttft=soon"], 2, "slo"),
        (["bench", "--input-len", "many"], 2, "--input-len"),
        (["bench", "--endpoint", "127.0.0.1:1"], 1, "endpoint"),
        (["bench", "--endpoint", "http://127.0.0.1:1", "--model", "m"], 1, "warm-up"),
        (["bench", "--trace", "no/such.jsonl"], 1, "no/such.jsonl"),
        (["bench", "--json", "no/such/out.json"], 2, "no folder"),
        (["bench-trace", "x.jsonl", "--rate", "0"], 2, "--rate"),
        (["apply", "no/such.yaml"], 1, "no/such.yaml"),
    ],
)
def test_a_failure_is_one_line(capsys: Any, arguments: list[str], code: int, words: str) -> None:
    ended, out, err = run(capsys, *arguments)
    assert ended == code
    assert out.strip() == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in err


def test_a_refusal_says_when_to_come_back(gateway: FakeServer, capsys: Any) -> None:
    prompt = "abort RESOURCE_EXHAUSTED full"
    code, _, err = run(capsys, "generate", prompt, "--raw", "--target", gateway.target)
    assert (code, err) == (1, "error: full (try again in 7 s)\n")


def test_bench_reports_and_writes_json(gateway: FakeServer, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = "--num-requests 4 --concurrency 2 --input-len 8:9 --output-len 3 --slo ttft=1m"
    endpoint = ["bench", "--endpoint", f"grpc://{gateway.target}"]
    assert run(capsys, *endpoint, *options.split())[0] == 2
    options = options.replace("1m", "60s") + f" --json {file} --json-requests"
    code, out, err = run(capsys, *endpoint, *options.split())
    assert code == 0, err
    assert "output_throughput" in out
    assert "p99" in out
    report = json.loads(file.read_text())
    assert report["results"]["output_tokens"] == 12
    assert report["results"]["slo_attainment"] == 1.0
    assert len(report["requests"]) == 4
    assert report["config"]["input_tokens"] == [8, 9]


def test_bench_that_fails_exits_1_unless_allowed(gateway: FakeServer, capsys: Any) -> None:
    wrong = f"bench --endpoint {gateway.url} --model other --num-requests 2 --warmup 0".split()
    code, out, _ = run(capsys, *wrong)
    assert code == 1
    assert "2 × HTTP 404" in out
    assert run(capsys, *wrong, "--allow-errors")[0] == 0


def test_bench_json_to_standard_output_is_only_json(gateway: FakeServer, capsys: Any) -> None:
    arguments = ["bench", "--endpoint", gateway.url, "--num-requests", "2", "--json", "-"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert json.loads(out)["results"]["requests"] == 2


def test_bench_sends_new_prompts_each_time_unless_seeded(gateway: FakeServer, capsys: Any) -> None:
    arguments = ["bench", "--endpoint", f"grpc://{gateway.target}", "--num-requests", "1"]
    for seed in ([], [], ["--seed", "5"], ["--seed", "5"]):
        assert run(capsys, *arguments, "--warmup", "0", *seed)[0] == 0
    prompts = [tuple(request.token_ids.ids) for request in gateway.requests]
    assert prompts[2] == prompts[3]
    assert len(set(prompts)) == 3


def test_explain_metrics_and_help_hold_every_formula(capsys: Any) -> None:
    from crossdock.bench.metrics import explain

    _, explained, _ = run(capsys, "bench", "--explain-metrics")
    _, helped, _ = run(capsys, "bench", "--help")
    for name, formula in explain():
        assert formula in explained
        assert f"{name}: " in helped


def test_bench_trace_writes_what_bench_reads(
    gateway: FakeServer, capsys: Any, tmp_path: Path
) -> None:
    file = str(tmp_path / "trace.jsonl")
    assert run(capsys, "bench-trace", file, "--requests", "30")[0] == 0
    options = f"--trace {file} --limit 5 --time-scale 0.001 --max-input 20 --max-output 3"
    endpoint = ["--endpoint", f"grpc://{gateway.target}"]
    assert run(capsys, "bench", *endpoint, *options.split(), "--warmup", "0")[0] == 0
    assert len(gateway.requests) == 5
    shared = {tuple(request.token_ids.ids[:16]) for request in gateway.requests}
    assert len(shared) == 1


def test_model_list_says_what_is_here(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CROSSDOCK_HOME", str(tmp_path))
    _, out, _ = run(capsys, "model", "list")
    row = next(line for line in out.splitlines() if "smollm2-135m-instruct" in line)
    assert "98 MB" in row
    assert "no: crossdock model fetch smollm2-135m-instruct" in row
    code, _, err = run(capsys, "model", "show", "smollm2-135m-instruct")
    assert (code, err.count("\n")) == (1, 1)
    assert "crossdock model fetch" in err


def test_model_show_describes_a_folder(capsys: Any, tiny_model: Path) -> None:
    code, out, _ = run(capsys, "model", "show", str(tiny_model))
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert code == 0
    assert (facts["architecture"], facts["num_layers"]) == ("llama", "2")
    assert len(facts["digest"]) == 64


def test_model_export_tells_where_and_refuses_what_is_there(
    capsys: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    command = ("model", "export", str(tiny_model), str(folder))
    code, out, err = run(capsys, *command)
    assert (code, out.strip()) == (0, str(folder))
    assert "copying 4 files" in err
    code, out, err = run(capsys, *command)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: folder: {folder} is not empty; --force")
    assert run(capsys, *command, "--force")[0] == 0
    assert "'int8' must be one of auto, float32" in run(capsys, *command, "--dtype", "int8")[2]


def test_model_fetch_of_an_unknown_name_is_refused(capsys: Any) -> None:
    code, _, err = run(capsys, "model", "fetch", "gpt-17")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: ")
    assert "gpt-17" in err
