"""Runs steps of one of vLLM's models: its worker computes, what is drawn is drawn here."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

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
from crossdock.engine.vllm.rank import Computed
from crossdock.engine.vllm.ranks import Ranks
from crossdock.kvcache.sequence import Chunk, SampledToken, StepPlan
from crossdock.model.store import ModelFiles, resolve
from crossdock.model.text import load_text
from crossdock.proto.errors import NotFinite
from crossdock.proto.memory import PoolMemory, region_sizes
from crossdock.proto.v1 import worker_pb2


class VllmEngine(Engine):
    """See contract.Engine: one model and its KV pool, in as many processes as there are ranks.
    Draws one token a step."""

    def __init__(
        self,
        ranks: Ranks,
        facts: EngineFacts,
        layout: worker_pb2.KVLayout,
        grammars: Grammars,
    ) -> None:
        self.facts, self.layout, self.memory = facts, layout, ranks.first.memory
        self.hosts = [other.host for other in ranks.others]
        self._ranks, self._grammars = ranks, grammars
        self._runner: Any = ranks.first.runner
        self._batch = RunnerBatch(self._runner, layout.block_size, self.memory.num_blocks)
        self._tainted: set[int] = set()  # blocks that may hold a NaN

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
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
        self._ranks.call("recover")

    def warmup(self) -> None:
        """vLLM's own: compiles, captures graphs, tunes kernels."""
        self._ranks.call("warmup")

    def close(self) -> None:
        """See contract.Engine.close."""
        self._grammars.close()
        self._ranks.close()

    def _compute(self, plan: StepPlan) -> Computed:
        try:
            computed: Computed = self._ranks.call("step", self._batch.begin(plan))
            return computed
        except BaseException:
            self._batch.forget()
            raise

    def _check_finite(self, plan: StepPlan, computed: Computed, rows: np.ndarray) -> None:
        """A NaN in the KV of a token is one in what the layers make of it. Waits for the device."""
        finite = np.logical_and.reduceat(
            _finite(computed.hidden[: plan.num_tokens]), computed.starts[:-1]
        )
        finite &= _finite(computed.logits)
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
            self._ranks.call("zero", blocks)

    def _score(self, plan: StepPlan, computed: Computed, rows: np.ndarray) -> None:
        scored = [(chunk, row) for chunk, row in zip(plan.chunks, rows) if chunk.scores is not None]
        if not scored:
            return
        parts = [_successors(chunk, computed.starts[row]) for chunk, row in scored]
        places, successors = (np.concatenate(each) for each in zip(*parts))
        score(
            lambda tokens: self._ranks.call("logits", tokens.cpu().numpy()),
            torch.from_numpy(places).to(computed.hidden.device),
            successors,
            max(chunk.scores.top for chunk, _ in scored if chunk.scores is not None),
            self.facts.vocab_size,
        ).spread(plan)


def _finite(rows: torch.Tensor) -> np.ndarray:
    """bool [rows] whether all values of each are. The sum of many float16 is beyond their range."""
    return rows.sum(-1, dtype=torch.float32).isfinite().cpu().numpy()


def _successors(chunk: Chunk, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the step whose logits score a prompt's, and those."""
    assert chunk.scores is not None
    first, end = chunk.scores.first, chunk.scores.first + chunk.scores.count
    places = start + np.arange(first - 1, end - 1) - chunk.start
    return places, np.array(chunk.sequence.token_ids[first:end], np.int64)


def create_engine(config: EngineConfig, allocate: Allocate) -> VllmEngine:
    """See registry.create."""
    files = resolve(config.model, config.home, any_family=True)
    options = vllm_config(config, files)
    ranks = Ranks(config, options, allocate)
    model = options.model_config
    return VllmEngine(
        ranks,
        EngineFacts(files.model_id, files.digest, model.get_vocab_size(), model.max_model_len),
        _layout(files, ranks.first.shape, ranks.first.memory),
        Grammars(functools.partial(load_text, files)),
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
        kv_heads=memory.ranks * heads,  # where there are fewer, ranks have some in common
        head_dim=head_size,
        tp_degree=memory.ranks,
        regions=region_sizes(memory.regions),
    )
