"""Log-probabilities of tokens that are given: of a prompt's, from the logits before each.

The logits of a whole prompt would be its length times the vocabulary: they are made a slice of rows
at a time, and of each slice no more is kept than what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crossdock.kvcache.sequence import StepPlan

SLICE_BYTES = 32 << 20  # of float32 logits at once


@dataclass(frozen=True)
class Scored:
    """What is kept of M rows, on the host; see PromptScores."""

    logprobs: np.ndarray  # float32 [M]
    ranks: np.ndarray  # int32 [M]
    top_ids: np.ndarray  # int32 [M, top]
    top_logprobs: np.ndarray  # float32 [M, top]
    finite: np.ndarray  # bool [M] whether all logits of the row are

    def spread(self, plan: StepPlan) -> None:
        """Hands each chunk of the plan its own rows, which come in their order."""
        start = 0
        for chunk in plan.chunks:
            if (scores := chunk.scores) is None:
                continue
            rows = slice(start, start + scores.count)
            start += scores.count
            top = scores.top = min(scores.top, self.top_ids.shape[1])
            scores.logprobs, scores.ranks = self.logprobs[rows], self.ranks[rows]
            scores.top_ids = self.top_ids[rows, :top]
            scores.top_logprobs = self.top_logprobs[rows, :top]


def score(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    token_ids: np.ndarray,
    top: int,
    vocab_size: int,
) -> Scored:
    """Of rows [M, hidden] whose next tokens are `token_ids` [M], with `top` alternatives.
    `logits_of`: hidden [m, hidden] → float32 [m, vocab]."""
    at_once = max(1, SLICE_BYTES // (4 * vocab_size))
    targets = torch.from_numpy(token_ids).to(hidden.device)
    slices = zip(hidden.split(at_once), targets.split(at_once))
    parts = [_score(logits_of(rows), ids, top) for rows, ids in slices]
    logprobs, ranks, ids, values, finite = (
        torch.cat(columns).cpu().numpy() for columns in zip(*parts)
    )
    order = np.lexsort((ids, -values))  # equal ones by id
    ids, values = (np.take_along_axis(each, order, axis=1) for each in (ids, values))
    return Scored(logprobs, ranks, ids, values, finite)


def _score(logits: Tensor, token_ids: Tensor, top: int) -> tuple[Tensor, ...]:
    """The fields of Scored for a slice: logits [m, vocab], token_ids [m]."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits > chosen).sum(-1) + 1
    values, ids = logits.topk(min(top, logits.shape[1]), dim=-1)
    return (
        (chosen - total).squeeze(1),
        ranks.int(),
        ids.int(),
        values - total,
        logits.sum(-1).isfinite(),
    )
