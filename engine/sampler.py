"""Draws tokens: a pure function of logits, parameters, seed and position.

    logits ─penalties─> ─bias─> ─temperature─> ─top-k─> ─top-p─> ─min-p─> inverse CDF at u

u is one uniform number, philox(seed, position). Nothing else is random and nothing is remembered,
so the same row gives the same token alone, in a batch, or on another worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.engine.philox import uniform
from crossdock.engine.sequence import SampledToken
from crossdock.proto.types import SamplingParams

# Without top-k the filters look among this many of the likeliest tokens, and only where that does
# not reach top-p's or min-p's cut among all: sorting a whole vocabulary costs more than the rest.
_NUCLEUS_SIZES = (256, 4096)


@dataclass(frozen=True)
class SampleRow:
    """What one row of logits is drawn with. `position`: index of the token in its sequence."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    position: int
    eos_token_ids: frozenset[int] = frozenset()


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """One token for each row of `logits`, float32 [rows, vocab], which is left as it was."""
    with torch.inference_mode():
        adjusted = _adjust(logits, rows)
        chosen = adjusted.argmax(dim=-1).tolist()
        for index, row in enumerate(rows):
            if not row.params.greedy:
                chosen[index] = _draw(adjusted[index], row)
        return [_spoken(logits[i], token, rows[i].params) for i, token in enumerate(chosen)]


def _adjust(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Penalties, bias and suppressed ends; the same tensor where no row asks for any."""
    changed = [i for i, row in enumerate(rows) if _needs_adjusting(row)]
    if not changed:
        return logits
    logits = logits.clone()
    for index in changed:
        _adjust_row(logits[index], rows[index])
    return logits


def _needs_adjusting(row: SampleRow) -> bool:
    return row.params.penalized or bool(row.params.logit_bias) or _ends_early(row)


def _ends_early(row: SampleRow) -> bool:
    return len(row.generated_ids) < row.params.min_tokens


def _adjust_row(logits: Tensor, row: SampleRow) -> None:
    params, device = row.params, logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.generated_ids}), device=device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.generated_ids and (params.presence_penalty or params.frequency_penalty):
        generated = torch.tensor(list(row.generated_ids), device=device)
        ids, counts = generated.unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=device)
    if _ends_early(row):
        ends = sorted({*row.eos_token_ids, *params.stop_token_ids})
        logits[torch.tensor(ends, dtype=torch.long, device=device)] = -torch.inf


def _draw(logits: Tensor, row: SampleRow) -> int:
    """Inverse CDF of the filtered distribution of one row, float32 [vocab]."""
    params = row.params
    u = uniform(params.seed, row.position)
    scaled = logits.double() / params.temperature
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        # In order of token id: no sort is needed when nothing is filtered.
        return _invert(torch.softmax(scaled, dim=-1), u)
    probabilities, ids = _filtered(scaled, params)
    return int(ids[_invert(probabilities, u)])


def _filtered(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Probabilities that stay, largest first, and their token ids. They need not sum to 1."""
    vocab = scaled.shape[-1]
    if params.top_k:
        values, ids = _largest(scaled, min(params.top_k, vocab))
        probabilities = torch.softmax(values, dim=-1)
    else:
        total = torch.logsumexp(scaled, dim=-1)
        for count in (*_NUCLEUS_SIZES, vocab):
            values, ids = _largest(scaled, min(count, vocab))
            probabilities = torch.exp(values - total)
            if _reaches_the_cut(probabilities, params):
                break
    if params.top_p < 1.0:
        # A token stays while those before it do not already make up top_p.
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = before < params.top_p
        probabilities, ids = probabilities[kept], ids[kept]
    kept = probabilities >= params.min_p * probabilities[0]
    return probabilities[kept], ids[kept]


def _reaches_the_cut(probabilities: Tensor, params: SamplingParams) -> bool:
    """Whether top-p or min-p cuts within these, the likeliest: then the others are not needed."""
    return bool(
        probabilities.sum() >= params.top_p or probabilities[-1] < params.min_p * probabilities[0]
    )


def _largest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, largest first; equal ones in order of token id."""
    values, ids = torch.topk(scaled, count)
    least = values[-1]
    # Which of those that tie with the last are kept must not depend on topk's inner order.
    above = torch.nonzero(scaled > least).flatten()
    tied = torch.nonzero(scaled == least).flatten()[: count - len(above)]
    ids = torch.cat((above, tied))
    order = torch.argsort(scaled[ids], descending=True, stable=True)
    ids = ids[order]
    return scaled[ids], ids


def _invert(probabilities: Tensor, u: float) -> int:
    """The first index whose cumulated probability exceeds u times the total."""
    cumulated = probabilities.cumsum(dim=-1)
    target = u * cumulated[-1]
    index = int(torch.searchsorted(cumulated, target, right=True))
    # Rounding can leave u beyond the last step: then the last token with any probability.
    return min(index, int(torch.nonzero(probabilities)[-1]))


def _spoken(logits: Tensor, token_id: int, params: SamplingParams) -> SampledToken:
    """The token with its logprobs, of the distribution before penalties and filters."""
    if params.logprobs is None:
        return SampledToken(token_id)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if params.logprobs:
        values, ids = torch.topk(logprobs, params.logprobs)
        top = tuple(zip(ids.tolist(), values.tolist()))
    return SampledToken(token_id, float(logprobs[token_id]), top)
