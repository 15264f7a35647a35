"""Fixtures for every room's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from crossdock.deploy.home import crossdock_home

settings.register_profile("fast", max_examples=10, deadline=None)  # of examples's 100
settings.register_profile("whole", deadline=None)  # no test fails because a machine is slow
settings.load_profile("whole")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the real model is slow; ahead of the choice by -m."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


os.environ.setdefault("NUMBA_CACHE_DIR", str(crossdock_home() / "numba"))  # as workers do
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: none needs threads beside it
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama (llama3 RoPE scaling) with tokenizer and chat template, as a folder."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF; skips where it was not fetched."""
    folder = crossdock_home() / "models" / "smollm2-135m-instruct"
    found = sorted(folder.glob("*.gguf"))
    if not found:
        pytest.skip("the default model is not here: crossdock model fetch smollm2-135m-instruct")
    return found[0]
