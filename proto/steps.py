"""What the time of engine steps goes by, as workers measure it and gateways predict from it."""

from __future__ import annotations

import enum


class Yields(enum.IntEnum):
    """Whose chunks a prompt waits for on a prefill worker: those of all smaller numbers."""

    NOT = 0
    OF_MANY = 1  # its tenant has much that waits, and another is expected that asks for less
    LATE = 2  # its first token is late anyway


YIELDING_SHARE = 4  # a prompt that yields has chunks of at most this part (1/4) of a step


def attention(cached: float, tokens: float, chunk_tokens: float) -> float:
    """Tokens × context, summed over the chunks in which `tokens` that follow `cached` ones are
    computed, where the context of a chunk reaches to its own end. Exact for whole chunks and for
    less than one."""
    return tokens * (2 * cached + tokens + min(tokens, chunk_tokens)) / 2
