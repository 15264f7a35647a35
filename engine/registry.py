"""Engines by the name that the YAML gives them. A kind's module is imported where it is asked for,
and by nobody else."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from crossdock.engine.contract import Allocate, Engine, EngineConfig, EngineSettings
from crossdock.proto.errors import ConfigError
from crossdock.proto.memory import MemoryType
from crossdock.proto.settings import setting

ENGINES = {
    "native": "crossdock.engine.native.engine",
    "simulated": "crossdock.engine.simulated",
    "vllm": "crossdock.engine.vllm.engine",
}


def kind_setting(kind: str) -> Any:
    """The field `kind` of the `Settings` of this kind of engine."""
    about = 'What computes; "Engines" in docs/architecture.md says what each kind is.'
    return setting(kind, about, choices=ENGINES)


def settings_of(kind: str) -> type[EngineSettings]:
    """What the YAML may say of an engine of this kind. Raises ConfigError for an unknown one."""
    return _module(kind).Settings


def create(config: EngineConfig, allocate: Allocate) -> Engine:
    """An engine of the kind that `config.engine` names, with its pool, before its warm-up. Raises
    ConfigError or ModelError saying what is wrong."""
    return _module(config.engine.kind).create(config, allocate)


def memory_type(config: EngineConfig) -> MemoryType:
    """Where the pool of this engine will lie, known before it is made."""
    return _module(config.engine.kind).memory_type(config)


def _module(kind: str) -> Any:
    if kind not in ENGINES:
        raise ConfigError("engine.kind", f"{kind!r} is not one of {', '.join(ENGINES)}")
    return import_module(ENGINES[kind])
