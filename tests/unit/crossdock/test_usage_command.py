"""crossdock usage, from what gateways have kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli_kit import run

from crossdock.router.frontdoor.usage import Amounts, add_rows


def test_sums_of_tenants(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "c.db"
    add_rows(
        file,
        {
            ("2026-11-21", "a", "key 1", "m"): Amounts(1, 10, 0, 5, 0.5, 0.0, 1.0),
            ("2026-11-22", "a", "key 2", "m"): Amounts(2, 20, 8, 6, 0.5, 0.0, 2.0),
            ("2026-11-22", "b", "key 3", "m"): Amounts(1, 30, 0, 7, 0.5, 0.0, 4.0),
        },
    )
    code, out, _ = run(capsys, "usage", "--file", str(file), "--json")
    assert code == 0
    assert [(row["tenant"], row["cost"]) for row in json.loads(out)] == [("a", 3.0), ("b", 4.0)]
    options = ["--tenant", "a", "--by-day", "--by-key", "--since", "2026-11-22"]
    code, out, _ = run(capsys, "usage", "--file", str(file), *options)
    assert code == 0 and "key 2" in out and "key 1" not in out and "key 3" not in out
    code, _, err = run(capsys, "usage", "--file", str(tmp_path / "none"))
    assert code == 1 and "has kept anything here" in err and "--cluster" not in err


def test_counts_are_whole_and_days_are_days(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("CROSSDOCK_HOME", str(tmp_path))
    amounts = Amounts(1, 10, 0, 5, 0.5, 0.0, 1.0)
    add_rows(tmp_path / "usage" / "mine.db", {("2026-11-22", "a", "key 1", "m"): amounts})
    code, out, _ = run(capsys, "usage", "--cluster", "mine", "--until", "2026-11-22", "--json")
    assert code == 0 and '"requests": 1,' in out and '"worker_seconds": 0.5' in out
    code, _, err = run(capsys, "usage")
    assert code == 1 and "--cluster names another: mine" in err
    for option in ("--since", "--until"):
        code, _, err = run(capsys, "usage", "--cluster", "mine", option, "yesterday")
        assert code and "'yesterday' must be a day" in err and option in err


def test_audit_commands(tmp_path: Path, capsys: Any) -> None:
    import asyncio

    from prometheus_client import CollectorRegistry

    from crossdock.router.config import AuditSettings
    from crossdock.router.frontdoor.audit import AuditLog

    async def write() -> Path:
        log = AuditLog(
            AuditSettings(file=str(tmp_path / "log")), "g", b"s" * 32, CollectorRegistry()
        )
        for i in range(5):
            log.add({"id": f"r{i}", "prompts": [{"tokens": 3}], "error": "refused"})
        await log.close()
        return log.path

    path = asyncio.run(write())
    code, out, _ = run(capsys, "audit", "verify", str(path))
    assert code == 0 and "whole: 7 lines, 5 requests" in out
    signer = out.rpartition("signed by ")[2].strip()
    assert run(capsys, "audit", "verify", str(path), "--key", signer)[0] == 0
    code, _, err = run(capsys, "audit", "verify", str(path), "--key", "00" * 32)
    assert code == 1 and f"signed by {signer}, which is none of the keys" in err
    assert "does not hold" not in err
    code, _, err = run(capsys, "audit", "verify", str(tmp_path / "log"))
    assert code == 1 and f"each gateway has its own: {path}" in err
    path.write_bytes(path.read_bytes().replace(b'"r3"', b'"r4"'))
    code, out, err = run(capsys, "audit", "verify", str(path))
    assert code == 1 and "NOT whole" in out and "changed" in err
    for asked in ("r1", "cmpl-r1", "chatcmpl-r1"):
        code, _, err = run(capsys, "audit", "replay", asked, str(path))
        assert code == 1 and "it was refused" in err
