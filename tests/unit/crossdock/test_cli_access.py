"""The commands about who uses a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_kit import run

from crossdock.router.frontdoor.keys import list_keys, parse_keys


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: Any) -> None:
    file = str(tmp_path / "keys.yaml")
    options = ["--model", "m", "--max-priority", "2", "--shared-cache", "--budget", "5.5"]
    options += ["--requests-per-minute", "60", "--expires", "2999-01-31", "--budget-per", "day"]
    code, out, _ = run(capsys, "keys", "new", "--tenant", "acme", "--file", file, *options)
    key = out.strip()
    assert code == 0
    found = parse_keys(Path(file).read_bytes()).find(key)
    assert found is not None
    assert (found.tenant, found.models, found.max_priority) == ("acme", {"m"}, 2)
    assert found.shared_cache and found.expires
    limits = found.limits
    assert (limits.requests_per_minute, limits.budget, limits.budget_per) == (60, 5.5, "day")
    assert "may read" not in run(capsys, "keys", "list", "--file", file)[1]
    more = ["--tenant", "other", "--metrics", "--file", file]
    assert run(capsys, "keys", "new", *more)[0] == 0
    code, shown, _ = run(capsys, "keys", "list", "--file", file)
    assert code == 0
    assert "may read" in shown and "acme" in shown and "requests_per_minute 60" in shown
    assert key.split("-")[2] not in shown
    assert run(capsys, "keys", "revoke", found.key_id, "--file", file)[0] == 0
    assert [each.tenant for each in list_keys(Path(file))] == ["other"]
    assert run(capsys, "keys", "revoke", found.key_id, "--file", file)[0] == 1


@pytest.mark.parametrize("option", [["--budget-per", "week", "--budget", "1"], ["--expires", "x"]])
def test_a_key_that_cannot_be_changes_nothing(tmp_path: Path, capsys: Any, option: Any) -> None:
    file = tmp_path / "keys.yaml"
    code, _, err = run(capsys, "keys", "new", "--tenant", "acme", "--file", str(file), *option)
    assert code == 1 and "error: " in err
    assert not file.exists()


def test_listing_what_is_not_there(tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "keys", "list", "--file", str(tmp_path / "none"))
    assert code == 1 and "cannot be read" in err


CHANGES = """
import sys
from pathlib import Path
from crossdock.router.frontdoor.keys import add_key, revoke_key

file = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(10):
    key = add_key(file, {"tenant": sys.argv[2]})
    if i % 2:
        revoke_key(file, key.split("-")[1])
"""


def test_processes_that_change_the_file_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    changing = [
        subprocess.Popen(
            [sys.executable, "-c", CHANGES, str(file), tenant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for tenant in "abc"
    ]
    for process in changing:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in changing:
        process.communicate(b"go\n", timeout=120)
    assert [process.returncode for process in changing] == [0, 0, 0]
    assert sorted(key.tenant for key in list_keys(file)) == sorted("abc" * 5)
    assert {path.name for path in tmp_path.iterdir()} == {"keys.yaml", ".keys.yaml.lock"}
