"""The table of EngineArgs, against the vLLM that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_args import text

from crossdock.engine.vllm import args


def test_the_table_is_that_of_the_vllm_that_is_installed() -> None:
    file = Path(args.__file__).with_name("engine_args.yaml")
    assert file.read_text(encoding="utf-8") == text(), "python tools/vllm_args.py writes it"
