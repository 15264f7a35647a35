"""The fence over vLLM's tensors: KV whose blocks its kernels wrote for somebody else is refused.

Two engines of this process, each with its real pool and transport; one offers, one pulls.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fence_kit import Made, Pair, Prefill, Side, check_refused, check_unfenced


@pytest.fixture(scope="module")
def pair(small_llama: Path) -> Iterator[Pair]:
    prefill, decode = Prefill(Made(small_llama)), Side(Made(small_llama))
    yield Pair(prefill, decode)
    decode.close()
    prefill.close()


def test_blocks_that_vllm_rewrote_are_refused_200_times_of_200(pair: Pair) -> None:
    check_refused(pair, 200)


def test_without_the_fence_wrong_tokens_are_drawn(pair: Pair) -> None:
    check_unfenced(pair, 20)
