"""Prompts of many lengths."""

from __future__ import annotations

import numpy as np

AT_ONCE = 8


def prompts(count: int, longest: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Lengths from 1 to `longest`, even in their logarithm."""
    rng = np.random.default_rng(seed)
    lengths = np.geomspace(1, longest, count).round().astype(int)
    return [rng.integers(3, vocabulary, length).tolist() for length in lengths]
