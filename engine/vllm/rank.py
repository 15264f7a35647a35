"""One rank of an engine: vLLM's worker and model runner, and this rank's part of every block."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from crossdock.engine.contract import Allocate, EngineConfig
from crossdock.engine.vllm.batch import Step
from crossdock.engine.vllm.options import refusals
from crossdock.engine.vllm.pool import BlockShape
from crossdock.proto.memory import PoolMemory


class Place(NamedTuple):
    """A rank among those of its engine."""

    number: int
    ranks: int
    meeting: str  # where they find each other, as torch.distributed takes it


class Computed(NamedTuple):
    """What a step leaves on the device, by row of the runner's batch."""

    logits: Tensor  # [rows, vocab] of the last token of each
    hidden: Tensor  # [tokens, hidden]
    starts: np.ndarray  # [rows + 1] first token of each


class Rank:
    """Where there are several, all do the same at once: in most of these calls they exchange what
    they have computed, and wait for each other."""

    def __init__(
        self, config: EngineConfig, options: VllmConfig, allocate: Allocate, place: Place
    ) -> None:
        """Raises ModelError or ConfigError for what vLLM cannot run."""
        self._threads, self._thread = max(1, config.threads // place.ranks), 0
        self._have_threads()
        with refusals(options.model_config.model), _without_unused(place.ranks):
            self._executor = _Executor(options, place)
        worker = self._executor.driver_worker.worker
        self.runner: Any = worker.model_runner
        self.shape = shape = BlockShape.of(options, self._executor)
        num_blocks = config.blocks_of(place.ranks * shape.block_bytes)
        on_host = options.device_config.device_type == "cpu"
        nbytes = num_blocks * shape.block_bytes
        buffer, generations = allocate(nbytes if on_host else 1, num_blocks)
        address = shape.place(num_blocks, buffer if on_host else None, self._executor)
        self.memory = PoolMemory(
            shape.regions(address, num_blocks),
            num_blocks,
            generations,
            "DRAM" if on_host else "VRAM",
            worker.device.index or 0,
            place.ranks,
        )
        self._hidden: Tensor | None = None

    @torch.inference_mode()
    def step(self, step: Step) -> Computed:
        """Computes it, and writes this rank's part of its KV."""
        self._have_threads()
        step.tell(self.runner)
        try:
            self._executor.execute_model(step.output)
        finally:
            state, self.runner.execute_model_state = self.runner.execute_model_state, None
        self._hidden = state.hidden_states
        starts = self.runner.query_start_loc.np[: len(step.output.num_scheduled_tokens) + 1]
        return Computed(state.logits, state.hidden_states, starts)

    @torch.inference_mode()
    def logits(self, tokens: np.ndarray) -> Tensor:
        """Float32 [tokens, vocab] after these tokens of the last step."""
        assert self._hidden is not None
        hidden = self._hidden[torch.from_numpy(tokens).to(self._hidden.device)]
        logits: Tensor = self.runner.model.compute_logits(hidden).float()
        return logits

    @torch.inference_mode()
    def zero(self, blocks: list[int]) -> None:
        """Overwrites all KV of these blocks."""
        for layer in self.runner.kv_caches:
            layer.unflatten(0, (self.memory.num_blocks, -1))[blocks] = 0

    def recover(self) -> None:
        """Gives back what a step that raised has left, and computes a small one, which leaves the
        pool alone."""
        self._hidden = None
        gc.collect()
        if self.memory.memory_type == "VRAM":
            torch.cuda.empty_cache()
        self._executor.execute_dummy_batch()

    def warmup(self) -> None:
        """vLLM's own: compiles, captures graphs, tunes kernels."""
        self._executor.compile_or_warm_up_model()
        self._executor.execute_dummy_batch()

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.memory.memory_type == "VRAM":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Nothing is called after it."""
        self._executor.shutdown()

    def _have_threads(self) -> None:
        """OpenMP counts its threads for each thread that computes, which is not always the one that
        made the model. vLLM's workers forbid torch.set_num_threads, which is the same."""
        if self._thread != (thread := threading.get_ident()):
            self._thread = thread
            torch._C.set_num_threads(self._threads)


@contextmanager
def _without_unused(ranks: int) -> Iterator[None]:
    """What vLLM makes for its ranks and nobody uses here is not made. Of one rank it has a dozen
    groups: they are one of each backend, since each of Gloo's has a thread that wakes 100 times a
    second. Of several it has a queue: 24 MB of shared memory that a process which is killed would
    leave behind."""
    owner: Any = torch.distributed if ranks == 1 else MessageQueue
    name = "new_group" if ranks == 1 else "create_from_process_group"
    real = vars(owner)[name]
    setattr(owner, name, _one_of_each(real) if ranks == 1 else lambda *_: None)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _one_of_each(new_group: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[str, Any] = {}

    def once(*args: Any, backend: Any = None, **named: Any) -> Any:
        if str(backend) not in made:
            made[str(backend)] = new_group(*args, backend=backend, **named)
        return made[str(backend)]

    return once


class _Executor(UniProcExecutor):
    """Of one rank: each is alone in its process, with a device of its number."""

    def __init__(self, options: VllmConfig, place: Place) -> None:
        self._place = place
        super().__init__(options)

    def _distributed_args(self) -> tuple[str, int, int]:
        return self._place.meeting, self._place.number, self._place.number
