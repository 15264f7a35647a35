"""Rotary position embedding: the cosine and sine of each (position, frequency)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from crossdock.model.config import ModelConfig


def rope_table(config: ModelConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 [context_length, head_dim]: cosines in the first half, sines in the second."""
    half = config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float32) / half
    frequencies = _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _scaled(frequencies: torch.Tensor, scaling: Mapping[str, Any] | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / float(scaling["factor"])
    if scaling["rope_type"] == "factors":
        return frequencies / torch.tensor(scaling["factors"], dtype=torch.float32)
    return _llama3_scaled(frequencies, scaling)


def _llama3_scaled(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated
    (Llama 3.1 model card)."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    kept = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)
