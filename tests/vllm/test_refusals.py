"""Which of vLLM's errors at start end the start for good, and which are the device's."""

from __future__ import annotations

import pytest

from crossdock.engine.vllm.options import refusals
from crossdock.proto.errors import ModelError


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("no such thing"), "model: vLLM: no such thing"),
        (KeyError("rope"), "model: vLLM: KeyError: 'rope'"),
        (AssertionError("heads"), "model: vLLM: AssertionError: heads"),
        (NotImplementedError("here"), "model: vLLM: NotImplementedError: here"),
    ],
)
def test_what_the_next_worker_would_meet_as_well(raised: Exception, told: str) -> None:
    with pytest.raises(ModelError, match=f"^{told}$"), refusals("model"):
        raise raised


def test_what_the_device_says_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), refusals("model"):
        raise RuntimeError("out of memory")


def test_a_file_that_is_not_there_is_no_fault_of_the_device() -> None:
    with pytest.raises(ModelError, match="vLLM: OSError: no folder"), refusals("m", OSError):
        raise OSError("no folder")
