"""What the YAML may say in `engine: {kind: vllm, args: {…}}`, checked without vLLM.

The names and types of vLLM's EngineArgs are in engine_args.yaml, which tools/vllm_args.py writes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from crossdock.engine.vllm.refused import INSTEAD, ONLY_1, REFUSED
from crossdock.proto.errors import ConfigError, show
from crossdock.proto.settings import closest

KV_ARGS = (  # by which KV, or what is computed from it, is something else
    *("hf_overrides", "hf_config_path", "model_class_overrides", "disable_sliding_window"),
    *("quantization", "quantization_config", "kv_cache_dtype", "kv_cache_dtype_skip_layers"),
)
TENSOR_PARALLEL, MOST_RANKS = "tensor_parallel_size", 64
_TYPES: Mapping[str | None, tuple[Any, str]] = {  # by its name in the table
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a string"),
    "list": (list, "a list"),
    "dict": (dict, "a mapping"),
    None: (type(None), "null"),
}


def check_args(path: str, args: Mapping[str, Any]) -> None:
    """Raises ConfigError, whose field begins with `path`, at the first argument that vLLM does not
    have, that is of another type there, or that is not for the YAML to say."""
    for name, value in args.items():
        _check_arg(f"{path}.{name}", name, value)


@functools.cache
def known_args() -> Mapping[str, list[Any]]:
    """By name, the types that an argument may have; a list among them is of its choices."""
    file = Path(__file__).with_name("engine_args.yaml")
    found: Mapping[str, list[Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def _check_arg(path: str, name: str, value: Any) -> None:
    if name not in known_args():
        meant = f"; did you mean {close}?" if (close := closest(name, known_args())) else ""
        raise ConfigError(path, f"vLLM's EngineArgs have no such field{meant}")
    if name in ONLY_1:
        if value != 1 or isinstance(value, bool):
            raise ConfigError(path, f"{show(value)} is not allowed; a vllm engine has 1")
        return
    if name == TENSOR_PARALLEL:
        if not _is(value, "int") or not 1 <= value <= MOST_RANKS:
            most = f"must be a whole number from 1 to {MOST_RANKS}"
            raise ConfigError(path, f"{show(value)} is not allowed; {most}")
        return
    if field := _first(INSTEAD, name):
        raise ConfigError(path, f"is not of args; say it with {field}")
    if why := _first(REFUSED, name):
        raise ConfigError(path, f"is not of args: {why}")
    allowed = known_args()[name]
    if not any(_is(value, kind) for kind in allowed):
        expected = " or ".join(map(_named, allowed))
        raise ConfigError(path, f"{show(value)} is not allowed; must be {expected}")


def _first(patterns: Mapping[str, str], name: str) -> str:
    return next((said for pattern, said in patterns.items() if fnmatchcase(name, pattern)), "")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return not isinstance(value, bool) and value in kind
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _TYPES[kind][0])


def _named(kind: Any) -> str:
    if isinstance(kind, list):
        return f"one of {', '.join(map(str, kind))}"
    return _TYPES[kind][1]
