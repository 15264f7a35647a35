"""Loaded by every process of a cluster: how long a vllm worker's steps take, and their parts.

With this folder on PYTHONPATH, CROSSDOCK_EVENT_LISTENER=vllm_forward:reached and CROSSDOCK_FORWARD
naming another folder, a worker keeps `<pid>.json` there: seconds, summed over its steps, of the
whole step, the engine in it, vLLM's model runner in that, and its model's forward pass in that.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("CROSSDOCK_FORWARD", "")
ENGINE = "crossdock.engine.vllm.runner"
RUNNER = "vllm.v1.worker.gpu_model_runner"
PARTS = {
    "step": ("crossdock.worker.loop", "EngineLoop", "turn"),
    "engine": (ENGINE, "VllmEngine", "run"),
    "runner": (RUNNER, "GPUModelRunner", "execute_model"),
    "forward": (RUNNER, "GPUModelRunner", "_model_forward"),
}

_spent: dict[str, float] = {}


def reached(event: str, who: str, detail: str) -> None:
    """From a worker's first event on its steps are timed."""
    if ENGINE in sys.modules and not _spent:
        _spent.update(dict.fromkeys(PARTS, 0.0))
        for part, (module, name, method) in PARTS.items():
            owner = getattr(importlib.import_module(module), name)
            setattr(owner, method, timed(part, getattr(owner, method)))


def timed(part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def outer(*args: Any, **named: Any) -> Any:
        began, computed = time.perf_counter(), _spent["engine"]
        try:
            return inner(*args, **named)
        finally:
            if part != "step":
                _spent[part] += time.perf_counter() - began
            elif _spent["engine"] > computed:  # else it was a turn without a step
                _spent[part] += time.perf_counter() - began
                Path(FOLDER, f"{os.getpid()}.json").write_text(json.dumps(_spent))

    return outer
