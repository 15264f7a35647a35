"""The clients that `make clients` runs: each has its script, and the API page its version."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_each_client_has_its_script_and_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "tools/clients"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    from run import CLIENTS

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for client in CLIENTS:
        assert client.script.is_file(), client.name
        row = rows[client.name]
        if client.pip or client.npm:
            assert f"| {client.version}" in row, f"{row} is not of {client.version}"
    scripts = {path.stem for path in (ROOT / "tools" / "clients").glob("check_*")}
    assert scripts == {client.script.stem for client in CLIENTS}


def test_an_environment_that_cannot_be_made_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "clients"))
    from environments import _call

    with pytest.raises(RuntimeError, match="no such package here"):
        _call(sys.executable, "-c", "import sys; sys.exit('no such package here')")
