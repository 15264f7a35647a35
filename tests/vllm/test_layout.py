"""What a layout says of KV beyond the shape of its blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_contract import make
from families import make_phi


def test_keys_that_long_rope_turned_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its two tables of factors vLLM takes one by max_model_len, for all positions."""
    model = make_phi(tmp_path / "model")

    def said(longest: int) -> str:
        # Else the second engine of a process has the first one's.
        monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
        engine = make("vllm", model, block_size=32, args={"max_model_len": longest})
        return engine.layout.dtype

    assert said(1024) == f"{said(512)} long RoPE"
