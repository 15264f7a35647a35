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
    assert code == 1 and "has kept anything here" in err
