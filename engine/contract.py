"""What a worker asks of an engine: one model replica and its KV pool. Imports no torch.

A kind of engine is one module, listed in registry.py. It defines `Settings`, which the YAML's
`engine` is checked by, and `create(config, allocate)`; importing it imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from crossdock.kvcache.sequence import SampledToken, StepPlan
from crossdock.model.store import NOWHERE
from crossdock.proto.errors import ConfigError
from crossdock.proto.memory import Generations, PoolMemory
from crossdock.proto.settings import setting
from crossdock.proto.v1 import worker_pb2

DTYPES = ("auto", "float32", "bfloat16", "float16")
WIRE_VERSION = 3  # 2: keyed block hashes, tickets bound to their prompt; 3: pools of regions

# (bytes, blocks) -> zeroed host memory uint8 [bytes] that the worker's transport can read, and
# generations int64 [blocks]. The caller of `create` owns both and outlives the engine. An engine of
# several ranks sends it to their processes.
Allocate = Callable[[int, int], tuple[npt.NDArray[np.uint8], Generations]]
# Runs a function of a module in the process of another rank, over its part of the pool and one end
# of a connection, until that is closed; returns the other end.
Host = Callable[[Callable[[PoolMemory, Connection], None]], Connection]


@dataclass(frozen=True)
class EngineSettings:
    """The YAML's `engine`; each kind adds fields of its own."""

    kind: str = setting()  # a name of registry.ENGINES, where it is documented
    any_family: ClassVar[bool] = False  # whether it knows models that this project does not

    @property
    def ranks(self) -> int:
        """How many processes of one worker compute together, each with its part of every block."""
        return 1

    @property
    def kv_args(self) -> Mapping[str, Any]:
        """By name, those of its arguments by which the same bytes of KV mean something else: where
        they differ, no engine can go on with another's."""
        return {}

    def check_kv_dtype(self, dtype: str) -> None:
        """Raises ConfigError where engines of this kind hold no such KV."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is made from. Sizes in tokens, blocks or MB."""

    engine: EngineSettings
    model: str = setting(
        doc="A known model, a folder in Hugging Face layout, or a .gguf file. "
        "A path that begins with . is taken from this file's folder.",
        kind="text",
    )
    dtype: str = setting(
        "auto",
        "Type of weights and products. auto: float32 on a CPU, else the model's own.",
        choices=DTYPES,
    )
    kv_dtype: str = setting("auto", "Type of keys and values. auto: model.dtype.", choices=DTYPES)
    block_size: int = setting(16, "Tokens in one KV block.", choices=(8, 16, 32, 64, 128))
    kv_memory_mb: int = setting(512, "Size of one worker's KV pool, MB.", low=1, high=4_000_000)
    max_batch: int = setting(64, "Most sequences in one engine step.", low=1, high=4096)
    chunk_tokens: int = setting(
        256, "Most prompt tokens computed in one engine step.", low=1, high=65_536
    )
    kv_blocks: int = 0  # 0: as many as kv_memory_mb holds
    threads: int = setting(1, "CPU threads of the engine.", low=1, high=1024)
    home: Path = NOWHERE  # where fetched models and digests are
    gpus: float | None = None  # that are reserved for it; None: take one where there is one

    def blocks_of(self, block_bytes: int) -> int:
        """How many blocks the pool has. Raises ConfigError where there is no room for two."""
        num_blocks = self.kv_blocks or (self.kv_memory_mb << 20) // block_bytes
        if num_blocks < 2:
            needed = -(-2 * block_bytes >> 20)
            raise ConfigError("kv_memory_mb", f"{self.kv_memory_mb} holds no 2 blocks; ≥ {needed}")
        return num_blocks


@dataclass(frozen=True)
class EngineFacts:
    """What a worker tells of its engine, and counts with."""

    model_id: str
    weights_digest: str
    vocab_size: int
    context_length: int  # tokens, of the model; the pool may hold fewer
    tokens_per_step: int = 1  # the most that one step draws for a sequence


class Engine(Protocol):
    """One model replica. Called by one thread; its attributes never change."""

    facts: EngineFacts
    layout: worker_pb2.KVLayout  # what a block is made of: pools of equal layout exchange blocks
    memory: PoolMemory  # the KV pool, which transports register; of rank 0
    hosts: Sequence[Host] = ()  # of the ranks after it, in their order

    @abstractmethod
    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        """Computes the chunks and writes their KV into their block tables; what comes before a
        chunk must be in its blocks. Returns the new tokens of each chunk in plan order: none where
        `sample` is not set, else none, one or several. Fills in a chunk's `scores`: log-
        probabilities of the model's own distribution, whatever else the step computes.

        The KV of all but the last of a chunk's new tokens is in its blocks as well: there are at
        most tokens_per_step of them, and no more than the block table has room for. Where none
        came, the chunk's last token is computed again. When this returns the KV is in memory:
        transports read it past the device's streams. Raises OfSequences for
        sequences that must not go on, CrossdockError for a step that fails of itself; any other
        exception is the device's. A step that raised can be run again.
        """

    def recover(self) -> None:
        """After a step that raised, once nothing holds its exception: gives back what it left.
        Raises where the device cannot do even a small step."""
        return

    def warmup(self) -> None:
        """Does what a first request would otherwise wait for. The pool is left as it is."""
        return

    def close(self) -> None:
        """Nothing is called after it."""
        return
