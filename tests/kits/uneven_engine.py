"""A kind of engine for tests: the simulated one, but a step draws none, one or two tokens in turn.

Registered as tests/engines_kit.py does it: one module, named in the registry.
"""

from __future__ import annotations

from itertools import cycle

from crossdock.engine import simulated
from crossdock.engine.contract import Allocate, EngineConfig
from crossdock.kvcache.sequence import Chunk

Settings = simulated.Settings


class UnevenEngine(simulated.SimulatedEngine):
    counts = cycle([2, 0, 1, 2, 2, 0, 0])

    def tokens_of(self, chunk: Chunk) -> int:
        return next(self.counts)


def create(config: EngineConfig, allocate: Allocate) -> simulated.SimulatedEngine:
    engine = simulated.create(config, allocate)
    engine.__class__ = UnevenEngine
    return engine
