"""The sampler: a pure function of logits, parameters, seed and position."""

from __future__ import annotations

import math
import random
import time
from collections import Counter

import pytest
import torch

from crossdock.engine.native.philox import philox4x32, uniform
from crossdock.engine.native.sampler import sample
from crossdock.kvcache.sequence import Sequence
from crossdock.proto.types import SamplingParams

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VOCAB = 997  # odd on purpose: rows are not aligned to vector registers


class Row(Sequence):
    """A sequence at any position, whatever tokens it has."""

    num_tokens = 0


def row(position: int = 0, prompt=(), generated=(), eos=frozenset(), **params) -> Row:
    settings, ids = SamplingParams(**params), [*prompt, *generated]
    made = Row("s", ids, len(prompt), settings, frozenset(eos))
    made.num_tokens = position
    return made


def draw(logits: torch.Tensor, **params) -> int:
    return sample(logits[None], [row(**params)])[0].token_id


def peaked(n: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(logits: torch.Tensor, count: int, **params) -> Counter:
    """Tokens of `count` positions, all from the same logits."""
    counts: Counter = Counter()
    for start in range(0, count, 500):
        n = min(500, count - start)
        rows = [row(position=start + i, **params) for i in range(n)]
        counts.update(token.token_id for token in sample(logits.expand(n, -1), rows))
    return counts


# -- philox ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The known-answer vectors that the Random123 library ships."""
    assert philox4x32(counter, key) == expected


def test_uniform_is_uniform_and_depends_on_every_bit():
    values = [uniform(7, position) for position in range(20_000)]
    assert all(0.0 <= value < 1.0 for value in values)
    bins = Counter(int(value * 100) for value in values)
    chi_square = sum((bins[i] - 200) ** 2 / 200 for i in range(100))
    assert chi_square < 148.2  # 99 degrees of freedom, p = 0.001
    changed = {
        uniform(0, 0),
        uniform(1, 0),
        uniform(1 << 63, 0),
        uniform(0, 1),
        uniform(0, 1 << 40),
    }
    assert len(changed) == 5
    assert uniform(0, 0) == ((0xE169C58D << 32 | 0x6627E8D5) >> 11) / 2**53


# -- distribution ----------------------------------------------------------------------------


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities by the textbook: masks on a full sort, each filter on what is left."""
    p = (logits.double() / params.temperature).softmax(0)
    if params.top_k:
        p = torch.where(p >= p.sort(descending=True).values[: params.top_k][-1], p, 0.0)
        p = p / p.sum()
    if params.top_p < 1:
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= params.top_p]] = 0.0
        p = p / p.sum()
    if params.min_p:
        p = torch.where(p >= params.min_p * p.max(), p, 0.0)
        p = p / p.sum()
    return p


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_k": 1},
        {"top_p": 0.8},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
        {"top_k": 5000, "top_p": 0.5},
    ],
    ids=str,
)
def test_frequencies_follow_the_filtered_distribution(params):
    logits = peaked()[0]
    p = reference(logits, SamplingParams(**params))
    count = 6000
    counts = drawn(logits, count, seed=11, **params)
    assert all(p[token] > 0 for token in counts)
    expected = p * count
    large = [i for i in range(VOCAB) if expected[i] >= 5]
    rest = count - sum(float(expected[i]) for i in large)
    chi_square = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in large)
    if rest > 5:
        rest_counts = count - sum(counts[i] for i in large)
        chi_square += (rest_counts - rest) ** 2 / rest
    freedom = max(1, len(large) - 1 + (rest > 5))
    # Wilson and Hilferty's approximation of the quantile at p = 0.0001
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_each_uniform_number_gives_the_token_of_the_inverse_cdf():
    logits = peaked(vocab=50)[0]
    p = reference(logits, SamplingParams(top_p=0.9))
    cumulative = p.cumsum(0)
    for position in range(300):
        expected = int((cumulative <= uniform(5, position)).sum())
        assert draw(logits, seed=5, position=position, top_p=0.9) == expected


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
def test_the_ends_of_the_unit_interval_give_kept_tokens(params, monkeypatch):
    logits = torch.tensor([-math.inf, -9.0, 1.0, 1.5, 2.0, -9.0, -math.inf])
    first, last = (2, 4) if params else (1, 5)
    monkeypatch.setattr("crossdock.engine.native.sampler.uniform", lambda seed, position: 0.0)
    assert draw(logits, **params) == first
    monkeypatch.setattr(
        "crossdock.engine.native.sampler.uniform", lambda seed, position: 1 - 2.0**-53
    )
    assert draw(logits, **params) == last


def test_top_p_keeps_the_token_that_crosses_and_at_least_one():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(drawn(logits, 500, top_p=0.49)) == {0}
    assert set(drawn(logits, 500, top_p=0.51)) == {0, 1}
    assert set(drawn(logits, 500, top_p=0.81)) == {0, 1, 2}
    assert set(drawn(logits, 500, top_p=1e-9)) == {0}
    assert set(drawn(logits, 2000, top_p=1.0)) == {0, 1, 2, 3}


def test_top_p_counts_only_what_top_k_kept():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(drawn(logits, 500, top_k=2, top_p=0.55)) == {0}  # 0.4 of 0.7 is enough
    assert set(drawn(logits, 500, top_p=0.55)) == {0, 1}


def test_ties_at_a_threshold_are_kept_together():
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert set(drawn(logits, 500, top_k=1)) == {1, 3}
    assert set(drawn(logits, 1000, top_k=3)) == {0, 1, 2, 3, 4}


def test_a_last_bit_does_not_turn_the_order_around():
    """Two machines' logits differ in the last bits: near-ties must not swap their shares."""
    logits = peaked(vocab=200)[0]
    logits[17] = logits[133] = 9.0
    noisy = logits + torch.randn(200, generator=torch.Generator().manual_seed(1)) * 1e-6
    for params in ({}, {"top_p": 0.95}, {"top_k": 30}, {"min_p": 0.001}):
        pairs = [
            (draw(logits, position=i, **params), draw(noisy, position=i, **params))
            for i in range(400)
        ]
        assert sum(a != b for a, b in pairs) <= 1


# -- purity ----------------------------------------------------------------------------------

MIXED = [
    {"temperature": 0.0},
    {},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.02, "temperature": 0.7},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4, "top_p": 0.95},
    {"logit_bias": {3: 5.0, 4: -100.0}, "min_tokens": 9, "max_tokens": 20, "stop_token_ids": (6,)},
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_alone_and_in_any_batch_gives_the_same_token(device):
    rng = random.Random(3)
    logits = peaked(64).to(device)
    rows = [
        row(
            position=rng.randrange(5000),
            seed=rng.randrange(2**64),
            prompt=[rng.randrange(VOCAB) for _ in range(30)],
            generated=[rng.randrange(VOCAB) for _ in range(i % 7)],
            eos={2},
            **MIXED[i % len(MIXED)],
        )
        for i in range(64)
    ]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(64)]
    assert sample(logits, rows) == alone
    order = list(range(64))
    rng.shuffle(order)
    for start in range(0, 64, 13):
        part = order[start : start + 13]
        assert sample(logits[part], [rows[i] for i in part]) == [alone[i] for i in part]


@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_left_unchanged_and_devices_agree(device):
    logits = peaked(len(MIXED))
    rows = [
        row(position=i, seed=i, prompt=[1, 2, 3], generated=[5, 5], **params)
        for i, params in enumerate(MIXED)
    ]
    there = logits.to(device)
    before = there.clone()
    tokens = sample(there, rows)
    assert torch.equal(there, before)
    assert [t.token_id for t in tokens] == [t.token_id for t in sample(logits, rows)]


def test_seed_and_position_decide():
    logits = peaked()[0]
    one = [draw(logits, seed=1, position=i) for i in range(50)]
    assert one == [draw(logits, seed=1, position=i) for i in range(50)]
    assert one != [draw(logits, seed=2, position=i) for i in range(50)]


# -- greedy ----------------------------------------------------------------------------------


def test_greedy_takes_the_first_largest():
    assert draw(torch.tensor([1.0, 3.0, 3.0, 2.0]), temperature=0.0) == 1


def test_tiny_temperatures_are_greedy_and_stay_finite():
    logits = torch.tensor([1.0, 3.0, 2.999, 2.0])
    for temperature in (1e-320, 1e-30, 1e-6, 2e-5):
        assert draw(logits, temperature=temperature, seed=4) == 1


def test_no_rows():
    assert sample(torch.empty(0, 5), []) == []


# -- penalties, bias, min_tokens -------------------------------------------------------------


def adjusted_argmax(logits: list[float], **params) -> int:
    return draw(torch.tensor(logits), temperature=0.0, **params)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    # prompt token 0 and generated token 1 are penalized, a repeated one no more than once
    assert (
        adjusted_argmax([4.0, 4.1, 2.2], prompt=[0, 0, 0], generated=[1], repetition_penalty=2) == 2
    )
    assert adjusted_argmax([4.0, 0.0, 1.9], prompt=[0, 0], repetition_penalty=2) == 0
    assert adjusted_argmax([-1.0, -1.5], prompt=[0], repetition_penalty=2) == 1


def test_presence_and_frequency_count_generated_tokens_only():
    assert adjusted_argmax([2.0, 1.5], prompt=[0], presence_penalty=1.0, frequency_penalty=1.0) == 0
    assert adjusted_argmax([2.0, 1.5], generated=[0], presence_penalty=1.0) == 1
    assert adjusted_argmax([2.0, 0.9], generated=[0, 0, 0], presence_penalty=1.0) == 0
    assert adjusted_argmax([2.0, 0.9], generated=[0, 0, 0], frequency_penalty=0.5) == 1
    assert adjusted_argmax([2.0, 2.5], generated=[0], presence_penalty=-1.0) == 0


def test_penalties_come_in_their_order():
    # repetition first: 4 / 2 - 1 = 1; the other way round it would be (4 - 1) / 2 = 1.5
    params = {"generated": [0], "repetition_penalty": 2.0, "presence_penalty": 1.0}
    assert adjusted_argmax([4.0, 1.2], **params) == 1
    assert adjusted_argmax([4.0, 0.9], **params) == 0


def test_logit_bias():
    assert adjusted_argmax([1.0, 0.0, 0.0], logit_bias={2: 1.5}) == 2
    assert adjusted_argmax([1.0, 0.5, 0.0], logit_bias={0: -100.0}) == 1


def test_min_tokens_suppresses_what_would_end_the_sequence():
    logits = [5.0, 4.0, 3.0]
    params = {"min_tokens": 2, "stop_token_ids": (1,), "eos": {0}}
    assert adjusted_argmax(logits, generated=[], **params) == 2
    assert adjusted_argmax(logits, generated=[2], **params) == 2
    assert adjusted_argmax(logits, generated=[2, 2], **params) == 0
    assert adjusted_argmax(logits, generated=[], ignore_eos=True, **params) == 0
    assert adjusted_argmax(logits, min_tokens=1, logit_bias={0: 100.0}, eos={0}) == 1


# -- logprobs --------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution():
    logits = peaked()[0]
    expected = logits.double().log_softmax(0)
    params = {"temperature": 0.3, "top_k": 2, "logit_bias": {9: 100.0}}
    token = sample(logits[None], [row(logprobs=4, **params)])[0]
    assert token.token_id == 9
    assert token.logprob == pytest.approx(float(expected[9]), abs=1e-4)
    best = expected.argsort(descending=True)[:4].tolist()
    assert [id_ for id_, _ in token.top_logprobs] == best
    for id_, logprob in token.top_logprobs:
        assert logprob == pytest.approx(float(expected[id_]), abs=1e-4)


def test_logprobs_only_where_asked_for():
    tokens = sample(peaked(3), [row(), row(logprobs=0), row(logprobs=2)])
    assert tokens[0].logprob is None and tokens[0].top_logprobs == ()
    assert tokens[1].logprob is not None and tokens[1].top_logprobs == ()
    assert len(tokens[2].top_logprobs) == 2


# -- cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.95}], ids=str
)
def test_a_row_costs_far_less_than_a_decode_step(params, one_thread):
    """A decode step of the default model takes tens of milliseconds."""
    logits = peaked(1, vocab=49_152)
    rows = [row(prompt=range(300), **params)]
    times = []
    for _ in range(20):
        start = time.thread_time()
        sample(logits, rows)
        times.append(time.thread_time() - start)
    assert min(times) < 0.003


@pytest.fixture
def one_thread():
    """As a worker on a CPU runs by default."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
