"""vLLM's engine holds to what every engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_contract import (  # noqa: F401  (tests)
    make,
    test_facts_layout_and_memory_agree,
    test_prompts_are_scored_alike_in_any_chunks_and_blocks,
    test_tokens_depend_on_the_prefix_and_on_the_kv_in_its_blocks,
)

from crossdock.engine.contract import Engine


@pytest.fixture(scope="module")
def engine(small_llama: Path) -> Engine:
    return make("vllm", small_llama, block_size=32)
