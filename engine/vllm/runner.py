"""Runs steps of one of vLLM's models: its worker computes, what is drawn is drawn here."""

from __future__ import annotations

import functools
import gc
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from crossdock.engine.contract import (
    WIRE_VERSION,
    Allocate,
    Engine,
    EngineConfig,
    EngineFacts,
)
from crossdock.engine.grammars import Grammars
from crossdock.engine.native.sampler import sample_step
from crossdock.engine.native.scorer import score
from crossdock.engine.vllm.batch import RunnerBatch
from crossdock.engine.vllm.options import vllm_config
from crossdock.engine.vllm.pool import BlockShape
from crossdock.kvcache.sequence import Chunk, SampledToken, StepPlan
from crossdock.model.store import ModelFiles, resolve
from crossdock.model.text import load_text
from crossdock.proto.errors import NotFinite
from crossdock.proto.memory import PoolMemory, region_sizes
from crossdock.proto.v1 import worker_pb2


class Computed(NamedTuple):
    """What a step leaves on the device, by row of the runner's batch."""

    logits: Tensor  # [rows, vocab] of the last token of each
    hidden: Tensor  # [tokens, hidden]
    starts: np.ndarray  # [rows + 1] first token of each


class VllmEngine(Engine):
    """See contract.Engine: one model and its KV pool in this process. Draws one token a step."""

    def __init__(
        self,
        executor: UniProcExecutor,
        facts: EngineFacts,
        layout: worker_pb2.KVLayout,
        memory: PoolMemory,
        grammars: Grammars,
        threads: int,
    ) -> None:
        self.facts, self.layout, self.memory = facts, layout, memory
        self._threads, self._thread = threads, 0
        self._executor, self._grammars = executor, grammars
        self._runner: Any = executor.driver_worker.worker.model_runner
        self._batch = RunnerBatch(self._runner, layout.block_size, memory.num_blocks)
        self._tainted: set[int] = set()  # blocks that may hold a NaN

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        self._have_threads()
        masks = self._grammars.begin([chunk.sequence for chunk in plan.chunks if chunk.sample])
        with torch.inference_mode():
            if self._tainted:
                self._clean(plan)
            computed = self._compute(plan)
            rows = self._batch.rows(plan)
            self._check_finite(plan, computed, rows)
            self._score(plan, computed, rows)
            sampled = [row for row, chunk in zip(rows, plan.chunks) if chunk.sample]
            logits = computed.logits[sampled].float()
        return sample_step(plan, logits, masks)

    def recover(self) -> None:
        """See contract.Engine.recover: the small step is vLLM's, which leaves the pool alone."""
        gc.collect()
        if self.memory.memory_type == "VRAM":
            torch.cuda.empty_cache()
        self._executor.execute_dummy_batch()

    def warmup(self) -> None:
        """vLLM's own: compiles, captures graphs, tunes kernels."""
        self._executor.compile_or_warm_up_model()
        self._executor.execute_dummy_batch()

    def close(self) -> None:
        """See contract.Engine.close."""
        self._grammars.close()
        self._executor.shutdown()

    def _have_threads(self) -> None:
        """OpenMP counts its threads for each thread that computes, and this is not the one that
        made the model. vLLM's workers forbid torch.set_num_threads, which is the same."""
        if self._thread != (thread := threading.get_ident()):
            self._thread = thread
            torch._C.set_num_threads(self._threads)

    def _compute(self, plan: StepPlan) -> Computed:
        try:
            self._executor.execute_model(self._batch.begin(plan))
        except BaseException:
            self._batch.forget()
            raise
        finally:
            state, self._runner.execute_model_state = self._runner.execute_model_state, None
        starts = self._runner.query_start_loc.np[: len(plan.chunks) + 1]
        return Computed(state.logits, state.hidden_states, starts)

    def _check_finite(self, plan: StepPlan, computed: Computed, rows: np.ndarray) -> None:
        """A NaN in the KV of a token is one in what the layers make of it. Waits for the device."""
        tokens = computed.hidden[: plan.num_tokens].sum(-1).isfinite().cpu().numpy()
        finite = np.logical_and.reduceat(tokens, computed.starts[:-1])
        finite &= computed.logits.sum(-1).isfinite().cpu().numpy()
        if not finite.all():
            wrong = [chunk for chunk, row in zip(plan.chunks, rows) if not finite[row]]
            self._tainted.update(*(chunk.sequence.block_table for chunk in wrong))
            raise NotFinite(
                "KV or logits are not finite: out of the range of the model's dtype?",
                [chunk.sequence.sequence_id for chunk in wrong],
            )

    def _clean(self, plan: StepPlan) -> None:
        """vLLM's kernels multiply what no token has written yet by 0, and a NaN stays one: a block
        whose first token comes now is zeroed if it may hold one. Others' tokens are in the rest."""
        size = self.layout.block_size
        begun = {b for c in plan.chunks for b in c.sequence.block_table[-(-c.start // size) :]}
        if blocks := sorted(begun & self._tainted):
            self._tainted.difference_update(blocks)
            for layer in self._runner.kv_caches:
                layer.unflatten(0, (self.memory.num_blocks, -1))[blocks] = 0

    def _score(self, plan: StepPlan, computed: Computed, rows: np.ndarray) -> None:
        scored = [(chunk, row) for chunk, row in zip(plan.chunks, rows) if chunk.scores is not None]
        if not scored:
            return
        parts = [_successors(chunk, computed.starts[row]) for chunk, row in scored]
        places, successors = (np.concatenate(each) for each in zip(*parts))
        score(
            lambda hidden: self._runner.model.compute_logits(hidden).float(),
            computed.hidden[torch.from_numpy(places).to(computed.hidden.device)],
            successors,
            max(chunk.scores.top for chunk, _ in scored if chunk.scores is not None),
            self.facts.vocab_size,
        ).spread(plan)


def _successors(chunk: Chunk, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the step whose logits score a prompt's, and those."""
    assert chunk.scores is not None
    first, end = chunk.scores.first, chunk.scores.first + chunk.scores.count
    places = start + np.arange(first - 1, end - 1) - chunk.start
    return places, np.array(chunk.sequence.token_ids[first:end], np.int64)


def create_engine(config: EngineConfig, allocate: Allocate) -> VllmEngine:
    """See registry.create."""
    torch._C.set_num_threads(config.threads)
    files = resolve(config.model, config.home, any_family=True)
    options = vllm_config(config, files)
    executor = UniProcExecutor(options)
    shape = BlockShape.of(options, executor)
    num_blocks = config.blocks_of(shape.block_bytes)
    on_host = options.device_config.device_type == "cpu"
    nbytes = num_blocks * shape.block_bytes
    buffer, generations = allocate(nbytes if on_host else 1, num_blocks)
    address = shape.place(num_blocks, buffer if on_host else None, executor)
    device = executor.driver_worker.worker.device
    memory = PoolMemory(
        shape.regions(address, num_blocks),
        num_blocks,
        generations,
        "DRAM" if on_host else "VRAM",
        device.index or 0,
    )
    model = options.model_config
    return VllmEngine(
        executor,
        EngineFacts(files.model_id, files.digest, model.get_vocab_size(), model.max_model_len),
        _layout(files, shape, memory),
        memory,
        Grammars(functools.partial(load_text, files)),
        config.threads,
    )


def _layout(files: ModelFiles, shape: BlockShape, memory: PoolMemory) -> worker_pb2.KVLayout:
    layers, heads, head_size = shape.sizes
    return worker_pb2.KVLayout(
        wire_version=WIRE_VERSION,
        engine="vllm",
        model_id=files.model_id,
        weights_digest=files.digest,
        dtype=shape.bytes_of,
        block_size=shape.config.cache_config.block_size,
        layers=layers,
        kv_heads=heads,
        head_dim=head_size,
        tp_degree=1,
        regions=region_sizes(memory.regions),
    )
