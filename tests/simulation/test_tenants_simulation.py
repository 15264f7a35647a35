"""A tenant at ten times its rate, on the virtual clock of benchmarks/tenants.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_flood_moves_another_tenants_p99_by_a_fifth_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tenants import measure

    assert "tenants" in sys.modules
    found = measure(seconds=60.0)
    assert found["ten times, limited"]["ratio"] <= 1.2
    assert found["ten times, unlimited"]["ratio"] <= 1.2
    assert found["ten times, no turns"]["ratio"] > 5, "turns are what does it"
    assert found["at its rate"]["other"]["refused"] == 0
