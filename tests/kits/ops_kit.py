"""A small model's shape, and a step with chunks of every kind."""

from __future__ import annotations

import numpy as np
import torch

from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.config import ModelConfig
from crossdock.proto.types import SamplingParams

CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    options: dict = {
        "architecture": "llama",
        "vocab_size": 10,
        "hidden_size": 50,
        "intermediate_size": 37,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "context_length": 1024,
    }
    return ModelConfig(**(options | changes))


def sequence(tokens: int, table: list[int]) -> Sequence:
    return Sequence("s", [0] * tokens, tokens, SamplingParams(), block_table=table)


def plan(block_size: int) -> tuple[StepPlan, int]:
    """Decode rows, short and long first chunks and later chunks; and how many blocks they need."""
    ends = [(0, 1), (299, 1), (0, 3), (200, 5), (0, 65), (130, 64), (63, 130), (0, 17)]
    chunks, used = [], 0
    order = np.random.default_rng(3)
    for start, length in ends:
        count = -(-(start + length) // block_size)
        table = (used + order.permutation(count)).tolist()
        used += count
        chunks.append(Chunk(sequence(start + length, table), start, length, start % 2 == 1))
    return StepPlan(tuple(chunks)), used
