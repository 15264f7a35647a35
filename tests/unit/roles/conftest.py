"""Workers of both roles on one virtual clock and network."""

from __future__ import annotations

import pytest
from roles_kit import Site


@pytest.fixture
def site() -> Site:
    return Site()
