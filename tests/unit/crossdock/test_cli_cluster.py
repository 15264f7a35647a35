"""The commands that talk to a cluster's controller."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cli_kit import fake_admin, run

import crossdock.deploy
from crossdock.cli_cluster import what_is_wrong
from crossdock.proto import errors
from crossdock.proto.v1 import admin_pb2, worker_pb2


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


def test_status_shows_what_the_autoscaler_wants_and_why(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = cluster()
    why = "3.2 sequences/s in 70 s"
    shown.autoscaled.add(
        pool="decode", least=1, most=8, target=5, floor=4, keep=6, reason=why, dry_run=True
    )
    fake_admin(monkeypatch, status=lambda **_: shown)
    code, out, _ = run(capsys, "status")
    assert code == 0 and "autoscaled pools (dry run)" in out
    row = next(line for line in out.splitlines() if why in line)
    cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    assert cells == ["decode", "1", "8", "4", "6", "5", why]


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
    assert run(capsys, "scale", "decode", "3", "--no-wait", "--credential", "mine.pem")[0] == 0
    common = {"wait": True, "timeout_s": 9.0, "address": "", "credential": None}
    assert calls[0] == common | {"path": file, "dry_run": False, "generation": 0}
    assert calls[1] == {
        "pool": "decode",
        "replicas": 3,
        "address": "127.0.0.1:50050",
        "wait": False,
        "timeout_s": 300.0,
        "credential": Path("mine.pem"),
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
    def down(address: str, drain_s: float, credential: Path | None) -> None:
        raise errors.ConfigError("pools.prefill.role", "unknown role 'x'", "c.yaml:7")

    fake_admin(monkeypatch, down=down)
    code, _, err = run(capsys, "down")
    assert (code, err) == (1, "error: c.yaml:7: pools.prefill.role: unknown role 'x'\n")


def test_an_unforeseen_error_is_one_line_too(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(address: str, drain_s: float, credential: Path | None) -> None:
        raise ZeroDivisionError("two\nlines")

    fake_admin(monkeypatch, down=down)
    code, _, err = run(capsys, "down")
    assert code == 1
    assert err.startswith("error: ZeroDivisionError: two lines")
    assert err.count("\n") == 1
