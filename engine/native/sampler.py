"""Draws tokens: a pure function of logits, sampling parameters, seed and position.

Each filter (top-k, top-p, min-p) is turned into a least logit, so what is kept depends on values
alone and ties are kept together. The inverse of the cumulative distribution is taken in the order
of token ids, which a last-bit difference between two machines' logits does not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from crossdock.engine.grammars import Mask, StepMasks
from crossdock.engine.native.philox import uniform
from crossdock.kvcache.sequence import SampledToken, Sequence, StepPlan
from crossdock.proto.types import SamplingParams

_LOWEST = torch.finfo(torch.float32).min

# Below this the distribution is one token for any logits of a model: drawn as greedy.
LEAST_TEMPERATURE = 1e-5


def sample_step(plan: StepPlan, logits: Tensor, masks: StepMasks) -> list[list[SampledToken]]:
    """What follows each chunk of a plan, from the logits of those with `sample`, in their order:
    nothing after those whose mask is not there in time. Raises GrammarFailed."""
    sampled = [chunk.sequence for chunk in plan.chunks if chunk.sample]
    ready = masks.collect()
    if len(ready) < len(sampled):
        logits = logits[[place for place, _ in ready]]
    rows = [sampled[place] for place, _ in ready]
    drawn = dict(zip(map(id, rows), sample(logits, rows, [mask for _, mask in ready])))
    return [[drawn[key]] if (key := id(chunk.sequence)) in drawn else [] for chunk in plan.chunks]


def sample(
    logits: Tensor, rows: list[Sequence], masks: SequenceOf[Mask | None] = ()
) -> list[SampledToken]:
    """The next token of each sequence, from its row of finite logits (float32 [rows, vocab], left
    unchanged). Logprobs are of the model's own distribution, before masks, penalties and filters.
    `masks`: for each row what its grammar allows, None where it has none; empty: nobody has."""
    if not rows:
        return []
    with torch.inference_mode():
        allowed = _allowed(masks, logits)
        adjusted = _adjust(logits, rows, allowed)
        token_ids = _draw(adjusted, rows)
        return _with_logprobs(logits, rows, token_ids)


def _allowed(masks: SequenceOf[Mask | None], logits: Tensor) -> dict[int, Tensor]:
    """By row, bool [vocab]: the tokens that its grammar allows."""
    rows = [i for i, mask in enumerate(masks) if mask is not None]
    if not rows:
        return {}
    packed, vocab = np.stack([mask for mask in masks if mask is not None]), logits.shape[1]
    if logits.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab, bitorder="little"))
    else:  # an eighth of the bytes to move
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        octets = torch.from_numpy(packed).to(logits.device).unsqueeze(2)
        bits = (octets >> shifts & 1).flatten(1)[:, :vocab]
    return dict(zip(rows, bits.bool()))


def _greedy(sequence: Sequence) -> bool:
    """Takes the most probable token; temperatures too small to divide by count as 0."""
    return sequence.sampling.temperature < LEAST_TEMPERATURE


def _suppressed(sequence: Sequence) -> list[int]:
    """Ids that may not be drawn because they would end the sequence before min_tokens."""
    params = sequence.sampling
    if sequence.num_generated >= params.min_tokens:
        return []
    eos = frozenset() if params.ignore_eos else sequence.eos_token_ids
    return sorted(eos.union(params.stop_token_ids))


def _adjusted(sequence: Sequence) -> bool:
    """Whether its logits are changed before the temperature."""
    params = sequence.sampling
    return params.penalized or bool(params.logit_bias) or bool(_suppressed(sequence))


def _draw(logits: Tensor, rows: list[Sequence]) -> list[int]:
    greedy = [i for i, row in enumerate(rows) if _greedy(row)]
    if len(greedy) == len(rows):
        return _draw_greedy(logits)
    token_ids = [0] * len(rows)
    if greedy:
        for i, token_id in zip(greedy, _draw_greedy(logits[greedy])):
            token_ids[i] = token_id
    random = [i for i, row in enumerate(rows) if not _greedy(row)]
    # A CPU is faster row by row, in its cache; a GPU with few launches.
    at_once = 1 if logits.device.type == "cpu" else len(random)
    for start in range(0, len(random), at_once):
        group = random[start : start + at_once]
        for i, token_id in zip(group, _draw_random(logits[group], [rows[i] for i in group])):
            token_ids[i] = token_id
    return token_ids


def _draw_greedy(logits: Tensor) -> list[int]:
    """The largest logit; the first of equal ones."""
    return logits.argmax(dim=-1).tolist()


def _draw_random(logits: Tensor, rows: list[Sequence]) -> list[int]:
    """Inverse of the cumulative distribution at u(seed, position)."""
    temperature = _column([row.sampling.temperature for row in rows], logits)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0
    weights = scaled.exp()
    least = [_least(scaled[i], weights[i], row.sampling) for i, row in enumerate(rows)]
    if any(value > -math.inf for value in least):
        weights.mul_(scaled >= _column(least, logits))
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    u = [uniform(row.sampling.seed, row.num_tokens) for row in rows]
    at = _column(u, logits, torch.float64) * total  # below total: u <= 1 - 2**-53
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).tolist()


def _least(scaled: Tensor, weights: Tensor, params: SamplingParams) -> float:
    """The least scaled logit that the filters keep; scaled, weights: [vocab], the largest 0, 1."""
    least = -math.inf
    highest: Tensor | None = None
    if 0 < params.top_k < scaled.numel():
        highest = scaled.topk(params.top_k).values
        least = float(highest[-1])
    if params.top_p < 1.0:
        least = max(least, _least_of_nucleus(scaled, weights, highest, params.top_p))
    if params.min_p > 0.0:
        least = max(least, math.log(params.min_p))
    return least


def _least_of_nucleus(
    scaled: Tensor, weights: Tensor, highest: Tensor | None, top_p: float
) -> float:
    """The scaled logit of the last token of the smallest set whose probability reaches top_p.
    highest: what top-k kept, in descending order, if it was used."""
    if highest is None:
        highest = _descending(scaled)
    else:
        weights = weights * (scaled >= highest[-1])
    total = weights.sum(dtype=torch.float64)
    cumulative = highest.exp().cumsum(0, dtype=torch.float64)
    last = int(torch.searchsorted(cumulative, top_p * total))
    return float(highest[min(last, highest.numel() - 1)])


def _descending(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # numpy sorts with SIMD, 30 times as fast
        return torch.from_numpy(np.sort(values.numpy())).flip(0)
    return values.sort(descending=True).values


def _adjust(logits: Tensor, rows: list[Sequence], allowed: dict[int, Tensor]) -> Tensor:
    """Penalties, logit_bias, then what a grammar does not allow and min_tokens suppresses, on a
    copy where needed."""
    changed = [i for i, row in enumerate(rows) if i in allowed or _adjusted(row)]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        row, params = logits[i], rows[i].sampling
        if params.repetition_penalty != 1.0:
            _penalize_repetition(row, rows[i], params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            _penalize_counts(row, rows[i], params)
        if params.logit_bias:
            ids = _ids(list(params.logit_bias), row)
            row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device).to(row)
        row.clamp_(_LOWEST, -_LOWEST)  # no penalty makes a finite logit infinite
        if i in allowed:
            row.masked_fill_(~allowed[i], -math.inf)
        if suppressed := _suppressed(rows[i]):
            ids = _ids(suppressed, row)
            without = row.index_fill(0, ids, -math.inf)
            if i not in allowed or without.max() > -math.inf:  # else the grammar is complete
                row.copy_(without)
    return logits


def _penalize_repetition(row: Tensor, sequence: Sequence, penalty: float) -> None:
    """Keskar et al. 2019 (CTRL): seen tokens' logits are divided, negative ones multiplied."""
    seen = _ids(np.unique(np.array(sequence.token_ids, dtype=np.int64)), row)
    values = row[seen]
    row[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _penalize_counts(row: Tensor, sequence: Sequence, params: SamplingParams) -> None:
    generated = sequence.token_ids[sequence.prompt_tokens :]
    ids, counts = np.unique(np.array(generated, dtype=np.int64), return_counts=True)
    penalty = params.presence_penalty + params.frequency_penalty * counts
    row[_ids(ids, row)] -= torch.from_numpy(penalty).to(row)


def _with_logprobs(
    logits: Tensor, rows: list[Sequence], token_ids: list[int]
) -> list[SampledToken]:
    sampled = []
    for i, (row, token_id) in enumerate(zip(rows, token_ids)):
        if row.sampling.logprobs is None:
            sampled.append(SampledToken(token_id))
            continue
        logprobs = logits[i].log_softmax(dim=-1)
        top: list[tuple[int, float]] = []
        if row.sampling.logprobs:
            values, ids = logprobs.topk(min(row.sampling.logprobs, logprobs.numel()))
            top = sorted(zip(ids.tolist(), values.tolist()), key=lambda pair: (-pair[1], pair[0]))
        sampled.append(SampledToken(token_id, float(logprobs[token_id]), tuple(top)))
    return sampled


def _ids(ids: list[int] | np.ndarray, row: Tensor) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64, device=row.device)


def _column(values: list[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device).unsqueeze(1)
