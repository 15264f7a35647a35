"""Runs steps of one model: tokens in, KV into the pool, tokens out."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import torch

from crossdock.engine.contract import Engine, EngineFacts
from crossdock.engine.grammars import Grammars
from crossdock.engine.native.attention.ops import make_ops
from crossdock.engine.native.batch import make_batch
from crossdock.engine.native.kv_cache import KVCache
from crossdock.engine.native.models.llama import LlamaModel
from crossdock.engine.native.sampler import sample_step
from crossdock.engine.native.scorer import Scored, score
from crossdock.engine.native.weights.load import load_weights
from crossdock.kvcache.sequence import Chunk, SampledToken, Sequence, StepPlan
from crossdock.model.config import ModelConfig, load_config
from crossdock.model.text import load_text
from crossdock.proto.errors import ConfigError, NotFinite
from crossdock.proto.types import SamplingParams

if TYPE_CHECKING:
    from crossdock.model.store import ModelFiles

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

WARMUP_TOKENS = 32


class ModelRunner(Engine):
    """See contract.Engine: one model and its KV pool on one device. Draws one token a step.

    What "auto" means is with resolve_dtype, resolve_kv_dtype and resolve_device. `threads`: CPU
    threads that this process computes with.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        num_blocks: int,
        block_size: int = 16,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        buffer: np.ndarray | None = None,
        generations: np.ndarray | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if block_size < 1 or block_size & (block_size - 1):
            raise ConfigError("block_size", f"{block_size} must be a power of two")
        if num_blocks < 1:
            raise ConfigError("num_blocks", f"{num_blocks} must be at least 1")
        self.files, self.config = files, load_config(files)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.config, self.device)
        kv_type = resolve_kv_dtype(kv_dtype, self.dtype)
        self.kv = KVCache(
            num_blocks, self.config, block_size, kv_type, self.device, buffer, generations
        )
        with torch.inference_mode():
            weights = load_weights(files, self.config)
            ops = make_ops(self.config, self.dtype, self.device, kv_type)
            self._model = LlamaModel(self.config, weights, ops, self.dtype, self.device)
        self._grammars = Grammars(lambda: load_text(files))
        self.facts = EngineFacts(
            files.model_id, files.digest, self.config.vocab_size, self.config.context_length
        )
        self.layout = self.kv.layout(files.model_id, files.digest)
        self.memory = self.kv.memory

    @staticmethod
    def kv_bytes_per_block(
        config: ModelConfig,
        block_size: int,
        dtype: str = "auto",
        device: str = "auto",
        kv_dtype: str = "auto",
    ) -> int:
        """What one block takes, known before the model is loaded."""
        resolved = resolve_dtype(dtype, config, resolve_device(device))
        return KVCache.bytes_per_block(config, block_size, resolve_kv_dtype(kv_dtype, resolved))

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        masks = self._grammars.begin([chunk.sequence for chunk in plan.chunks if chunk.sample])
        return sample_step(plan, self.logits(plan), masks)

    def logits(self, plan: StepPlan, every_token: bool = False) -> torch.Tensor:
        """As `run`, with all scores, but returns the logits: float32 [sampled chunks, or all
        tokens; vocab].

        Raises NotFinite, naming the sequences whose KV or logits hold a NaN or an infinity."""
        batch = make_batch(plan, self.kv.block_size, self.kv.num_blocks, every_token)
        scored: Scored | None = None
        with torch.inference_mode():
            computed = self._model.forward(batch, self.kv)
            finite = computed.finite.cpu().numpy()  # waits for all that wrote KV
            finite[batch.sampled] &= computed.logits.sum(-1).isfinite().cpu().numpy()
            if len(batch.scored):
                scored = score(
                    self._model.logits,
                    computed.scored,
                    batch.successors,
                    max(chunk.scores.top for chunk in plan.chunks if chunk.scores is not None),
                    self.config.vocab_size,
                )
                finite[batch.scored] &= scored.finite
        if not finite.all():
            chunks = np.unique(batch.chunk_of_row[~finite])
            raise NotFinite(
                "KV or logits are not finite: out of the range of the model's dtype?",
                [plan.chunks[index].sequence.sequence_id for index in chunks],
            )
        if scored is not None:
            scored.spread(plan)
        return computed.logits

    def close(self) -> None:
        """See contract.Engine.close."""
        self._grammars.close()

    def recover(self) -> None:
        """See contract.Engine.recover: the small steps are those of the warm-up."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.warmup()

    def warmup(self) -> None:
        """Small steps over a pool of their own: they compile and touch what a request needs."""
        blocks = -(-WARMUP_TOKENS // self.kv.block_size)
        scratch = KVCache(2 * blocks, self.config, self.kv.block_size, self.kv.dtype, self.device)
        pool, self.kv = self.kv, scratch
        try:
            for plan in _warmup_plans(blocks):
                self.run(plan)
        finally:
            self.kv = pool


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            "device", f"{device!r} is no device: auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", f"{device!r}: this machine has no usable GPU")
    return resolved


def resolve_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """float32 for "auto" on a CPU: bf16 and fp16 products there are slower by a factor of 100
    where the units are missing, and never more exact."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else config.dtype
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"{dtype!r} must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def resolve_kv_dtype(kv_dtype: str, compute: torch.dtype) -> torch.dtype:
    """`compute` for "auto". Attention reads other types as that one."""
    if kv_dtype == "auto":
        return compute
    if kv_dtype not in DTYPES:
        message = f"{kv_dtype!r} is no type of KV of the native engine: auto, {', '.join(DTYPES)}"
        raise ConfigError("kv.dtype", message)
    return DTYPES[kv_dtype]


def _warmup_plans(blocks: int) -> list[StepPlan]:
    """A prefill chunk, its continuation beside another sequence, then decode beside prefill."""
    half = WARMUP_TOKENS // 2
    one, other = (
        Sequence(
            sequence_id="warm-up",
            token_ids=[0] * WARMUP_TOKENS,
            prompt_tokens=WARMUP_TOKENS,
            sampling=SamplingParams(),
            block_table=list(range(first, first + blocks)),
        )
        for first in (0, blocks)
    )
    return [
        StepPlan((Chunk(one, 0, half, False),)),
        StepPlan((Chunk(one, half, half - 1, True), Chunk(other, 0, half, False))),
        StepPlan((Chunk(one, WARMUP_TOKENS - 1, 1, True), Chunk(other, half, half, True))),
    ]
