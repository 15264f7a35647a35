"""Tests over vLLM, skipped where it is not installed: `make test-vllm` runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make vllm"))


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_model, with heads of a size that vLLM's attention takes."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "small", "llama", head_dim=32)
