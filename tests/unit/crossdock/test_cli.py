from __future__ import annotations

import inspect
import json
import resource
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from typer.testing import CliRunner

import crossdock.deploy
from crossdock.cli import app, main
from crossdock.cli_cluster import what_is_wrong
from crossdock.deploy import admin
from crossdock.proto import errors
from crossdock.proto.v1 import admin_pb2, worker_pb2

COMMANDS = [
    *("generate", "chat", "status", "doctor", "model", "up", "apply", "scale", "down"),
    *("bench", "bench-trace"),
]


@pytest.fixture
def gateway() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_command_fast_and_without_the_heavy_parts() -> None:
    script = (
        "import sys\n"
        "from crossdock.cli import main\n"
        "code = main(['--help'])\n"
        "assert code == 0\n"
        "assert not {'torch', 'ray', 'grpc', 'numpy', 'aiohttp', 'nixl'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
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


def cluster() -> admin_pb2.ClusterStatus:
    worker = worker_pb2.WorkerStatus(
        load=worker_pb2.Load(waiting=11, running=12, cached_blocks=13, total_blocks=2048),
        used_blocks=15,
        prompt_tokens=200,
        cached_tokens=50,
        leases=[worker_pb2.Lease()] * 3,
    )
    decode = admin_pb2.MemberStatus(
        name="decode-0",
        pool="decode",
        role=worker_pb2.ROLE_DECODE,
        state="starting",
        error="exit 7",
    )
    prefill = admin_pb2.MemberStatus(
        name="prefill-0",
        pool="prefill",
        role=worker_pb2.ROLE_PREFILL,
        state="ready",
        node_id="abcdef0123",
        restarts=4,
        worker=worker,
    )
    gateway = admin_pb2.GatewayStatus(name="gateway-0", state="ready", grpc="127.0.0.1:50051")
    decision = admin_pb2.Decision(action="start decode-0", reason="pool decode has 0 of 1 [x]")
    return admin_pb2.ClusterStatus(
        name="local",
        model="m",
        workers=[prefill, decode],
        gateways=[gateway],
        decisions=[decision],
        generation=3,
        waiting_for=["decode-0 is starting: exit 7"],
    )


def fake_admin(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """Fakes that take what the real functions take, so that a wrong call still fails."""
    for name, function in functions.items():
        real = inspect.signature(getattr(admin, name))

        def checked(*args: Any, _real: Any = real, _do: Any = function, **named: Any) -> Any:
            bound = _real.bind(*args, **named)
            bound.apply_defaults()
            return _do(**bound.arguments)

        monkeypatch.setattr(admin, name, checked)


def test_status_shows_workers_gateways_and_decisions(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def status(address: str, check_integrity: bool, **_: Any) -> admin_pb2.ClusterStatus:
        asked.append((address, check_integrity))
        return cluster()

    fake_admin(monkeypatch, status=status)
    code, out, _ = run(capsys, "status", "--address", "127.0.0.1:9")
    assert (code, asked) == (0, [("127.0.0.1:9", False)])
    row = next(line for line in out.splitlines() if "prefill-0" in line)
    cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    figures = ["11", "12", "15", "13", "2048", "25.0%", "3", "4"]
    assert cells == ["prefill-0", "prefill", "prefill", "ready", "abcdef01", *figures]
    assert any("decode-0" in line and "starting" in line for line in out.splitlines())
    assert "127.0.0.1:50051" in out
    assert "decode-0 is starting: exit 7" in out
    assert "generation 3" in out
    assert "start decode-0: pool decode has 0 of 1 [x]" in out
    code, out, _ = run(capsys, "status", "--json")
    assert json.loads(out)["workers"][0]["worker"]["used_blocks"] == 15


def test_status_shows_open_leases_the_oldest_first(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who holds KV, since when and for how long: on all workers together, and not all of many."""
    many = cluster()
    del many.workers[0].worker.leases[:]
    fake_admin(monkeypatch, status=lambda **_: many)
    assert "open leases" not in run(capsys, "status")[1]

    def lease(index: int) -> worker_pb2.Lease:
        return worker_pb2.Lease(
            ticket_id=bytes([index]) * 16,
            sequence_id=f"gateway-0-ab-{index}",
            owner=f"gateway-0/{index}",
            blocks=70 + index,
            age_s=index + 0.25,
            remaining_s=30 - index,
        )

    many.workers[0].worker.leases.extend(lease(index) for index in range(0, 24, 2))
    many.workers[1].worker.leases.extend(lease(index) for index in range(1, 24, 2))
    code, out, _ = run(capsys, "status")
    shown = out.split("open leases")[1].splitlines()
    rows = [[c.strip() for c in line.strip("│").split("│")] for line in shown if "-ab-" in line]
    assert code == 0 and len(rows) == 20
    assert rows[0] == ["decode-0", "gateway-0-ab-23", "gateway-0/23", "93", "23.2 s", "7.0 s"]
    assert rows[1][0] == "prefill-0"
    assert [int(row[3]) for row in rows] == list(range(93, 73, -1))
    assert "… and 4 more" in out
    told = json.loads(run(capsys, "status", "--json")[1])["workers"][0]["worker"]["leases"]
    assert len(told) == 12 and told[1] | {"ticket_id": ""} == {
        "ticket_id": "",
        "sequence_id": "gateway-0-ab-2",
        "owner": "gateway-0/2",
        "blocks": 72,
        "age_s": 2.25,
        "remaining_s": 28.0,
    }


def test_status_check_fails_on_whatever_is_wrong(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sick = cluster()
    sick.workers[0].worker.integrity_error = "block 7 is nobody's"
    fake_admin(monkeypatch, status=lambda **_: sick)
    code, _, err = run(capsys, "status", "--check")
    assert code == 1
    assert "prefill-0: block 7 is nobody's" in err
    assert "decode-0 is starting: exit 7" in err
    assert "decode-0 does not answer" in err
    well = cluster()
    well.converged = True
    del well.workers[1], well.waiting_for[:]
    assert what_is_wrong(well) == []
    fake_admin(monkeypatch, status=lambda **_: well)
    assert run(capsys, "status", "--check")[0] == 0


def test_apply_and_scale_show_actions_and_fail_when_not_converged(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []
    converged, hopeless = True, list[str]()

    def answer(**arguments: Any) -> admin_pb2.ApplyResponse:
        arguments.pop("progress")("decode-1 is starting")
        calls.append(arguments)
        waiting = [] if converged else ["decode pauses 4 s"]
        return admin_pb2.ApplyResponse(
            actions=["start prefill-1"], converged=converged, waiting_for=waiting, hopeless=hopeless
        )

    fake_admin(monkeypatch, apply=answer, scale=answer)
    file = tmp_path / "c.yaml"
    file.write_text("kind: Cluster\n")
    assert run(capsys, "apply", str(file), "--timeout", "9")[:2] == (0, "start prefill-1\n")
    assert run(capsys, "scale", "decode", "3", "--no-wait")[0] == 0
    common = {"wait": True, "timeout_s": 9.0, "address": ""}
    assert calls[0] == common | {"path": file, "dry_run": False, "generation": 0}
    assert calls[1] == {
        "pool": "decode",
        "replicas": 3,
        "address": "127.0.0.1:50050",
        "wait": False,
        "timeout_s": 300.0,
    }
    converged = False
    code, _, err = run(capsys, "scale", "decode", "3")
    assert code == 1
    waiting, error = err.splitlines()
    assert waiting == "waiting: decode-1 is starting"
    assert error.startswith("error: ") and "as asked after 300 s: decode pauses 4 s;" in error
    hopeless = ["decode-1: ConfigError: kv_memory_mb"]
    assert (
        "as asked: decode-1: ConfigError: kv_memory_mb;" in run(capsys, "scale", "decode", "3")[2]
    )
    assert run(capsys, "apply", str(file), "--dry-run")[0] == 0


def test_up_serves_the_packaged_cluster_unless_told_otherwise(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[Path, str | None]] = []

    def up(path: Path, address: str | None = None) -> int:
        assert path.suffix == ".yaml"
        served.append((path, address))
        return 3

    module = types.ModuleType("crossdock.deploy.up")
    module.up = up  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(crossdock.deploy, "local", module, raising=False)
    assert run(capsys, "up")[0] == 3
    assert run(capsys, "up", "mine.yaml", "--address", "ray:1")[0] == 3
    assert served[0][0].name == "local-cpu.yaml"
    assert served[1] == (Path("mine.yaml"), "ray:1")


def test_errors_of_the_tree_are_shown_as_they_are(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(address: str, drain_s: float) -> None:
        raise errors.ConfigError("pools.prefill.role", "unknown role 'x'", "c.yaml:7")

    fake_admin(monkeypatch, down=down)
    code, _, err = run(capsys, "down")
    assert (code, err) == (1, "error: c.yaml:7: pools.prefill.role: unknown role 'x'\n")


def test_an_unforeseen_error_is_one_line_too(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(address: str, drain_s: float) -> None:
        raise ZeroDivisionError("two\nlines")

    fake_admin(monkeypatch, down=down)
    code, _, err = run(capsys, "down")
    assert code == 1
    assert err.startswith("error: ZeroDivisionError: two lines")
    assert err.count("\n") == 1


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


def test_model_fetch_of_an_unknown_name_is_refused(capsys: Any) -> None:
    code, _, err = run(capsys, "model", "fetch", "gpt-17")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: ")
    assert "gpt-17" in err
