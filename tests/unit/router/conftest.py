"""A gateway before fake workers, the text of its model, and the dice of its placement."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import Rig, start_rig

from crossdock.model.store import resolve
from crossdock.model.text import load_text


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model) as made:
        yield made


@pytest.fixture
def text(tiny_model: Path) -> Any:
    return load_text(resolve(str(tiny_model)))


@pytest.fixture
def model(tiny_model: Path) -> str:
    return resolve(str(tiny_model)).model_id


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)
