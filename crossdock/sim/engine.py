"""An engine that only takes time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossdock.engine.contract import WIRE_VERSION, Engine, EngineFacts
from crossdock.engine.profiles import Profile
from crossdock.kvcache.sequence import SampledToken, Sequence, StepPlan
from crossdock.proto.memory import PoolMemory
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.config import WorkerConfig

VOCAB_SIZE = 32_768  # of made-up prompts
MOST_STEPS = 32  # in one run
CONTEXT_LENGTH = 1 << 20  # tokens: as many as the pool holds
END_ID = 0
DRAWN_ID = 7


class PacedEngine(Engine):
    """See engine.contract.Engine. Every token is the same, until an answer has as many tokens as
    its seed says: then it ends. `spend` lets the time of a step pass. The pool is as large as
    `config` says, and has no memory.

    A run may stand for `steps` steps of decodes alone that are all alike, one token each."""

    def __init__(self, config: WorkerConfig, profile: Profile, spend: Callable[[], None]) -> None:
        self.facts = EngineFacts("simulated", "", VOCAB_SIZE, CONTEXT_LENGTH)
        self.layout = worker_pb2.KVLayout(
            wire_version=WIRE_VERSION, engine="paced", block_size=config.block_size
        )
        block_bytes = config.block_size * profile.kv_bytes_per_token
        num_blocks = config.blocks_of(block_bytes)
        self.memory = PoolMemory.block_major(
            0, num_blocks, block_bytes, np.zeros(num_blocks, np.int64)
        )
        self.steps = 1
        self._profile, self._spend, self._block_size = profile, spend, config.block_size
        self._drawn, self._end = SampledToken(DRAWN_ID), SampledToken(END_ID)

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        self._spend()
        return [self._draw(chunk.sequence) if chunk.sample else [] for chunk in plan.chunks]

    def seconds(self, plan: StepPlan, steps: int) -> float:
        """Of so many steps like this one: each finds a token more of every sequence."""
        longer = self._profile.decode_context_s * len(plan.chunks) * steps * (steps - 1) / 2
        return steps * self._profile.step_s(plan) + longer

    def most_steps(self, plan: StepPlan) -> int:
        """How many steps would be like this one: until a sequence ends, or needs another block."""
        steps = MOST_STEPS
        for chunk in plan.chunks:
            sequence = chunk.sequence
            # What follows token 0 tells how long the hand-off took: it comes by itself.
            if chunk.length > 1 or not chunk.sample or sequence.num_generated < 2:
                return 1
            room = len(sequence.block_table) * self._block_size - chunk.end + 1
            steps = min(steps, room, sequence.sampling.seed - sequence.num_generated)
            if steps <= 1:
                return 1
        return steps

    def _draw(self, sequence: Sequence) -> list[SampledToken]:
        left = sequence.sampling.seed - sequence.num_generated
        if left > self.steps:
            return [self._drawn] * self.steps
        return [*[self._drawn] * (left - 1), self._end]
