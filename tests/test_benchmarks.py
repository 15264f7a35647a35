"""The judgements inside the benchmark scripts, on numbers worked out by hand."""

from __future__ import annotations

import queue
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from crossdock.bench_metrics import RequestRecord, Run
from crossdock.deploy.spec import ClusterSpec

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def model_of(logits: torch.Tensor) -> object:
    """Answers with the last rows of these logits, as transformers' models do."""

    def forward(ids: torch.Tensor, logits_to_keep: int) -> types.SimpleNamespace:
        assert ids.tolist() == [[7, 8, 0, 1]]
        return types.SimpleNamespace(logits=logits[None, -logits_to_keep:])

    return forward


def test_equivalence_tells_equal_tied_and_wrong_tokens_apart() -> None:
    from equivalence import compare

    logits = torch.tensor([[5.0, 1.0, 0.0], [2.0, 1.9995, 0.0], [0.0, 3.0, 1.0]])
    seen = compare(model_of(logits), [7, 8], (0, 1, 2))
    assert (seen.tokens, seen.ties, seen.mismatches) == (3, 1, 1)
    assert seen.largest_gap == 2.0


def test_equivalence_prompts_are_of_every_length() -> None:
    from equivalence import prompts

    made = prompts(40, 2000, english=list(range(100, 900)))
    lengths = [len(prompt) for prompt in made]
    assert len(made) == 40
    assert (min(lengths), max(lengths)) == (1, 2000)
    assert sum(length > 500 for length in lengths) >= 5
    assert made == prompts(40, 2000, english=list(range(100, 900)))


def test_throughput_lays_rounds_end_to_end() -> None:
    from throughput import pooled

    def round_of(tokens: int, seconds: float) -> Run:
        record = RequestRecord(0, 0.0, 0.0, (0.5, seconds), seconds, 10, tokens)
        return Run((record,))

    whole = pooled([round_of(20, 2.0), round_of(10, 4.0)])
    assert whole["duration_s"] == 6.0
    assert whole["output_throughput"] == 5.0
    assert whole["ttft_s"]["p50"] == 0.5


def test_a_storm_comes_in_bursts() -> None:
    from compare_colocated import storm_jobs

    options = Namespace(bursts=2, burst=3, storm_tokens=50, calm_s=10.0, burst_every_s=5.0)
    jobs = storm_jobs(options, seed=1)
    assert [job.due_s for job in jobs] == [10.0] * 3 + [15.0] * 3
    assert len({job.token_ids for job in jobs}) == 6
    assert {len(job.token_ids) for job in jobs} == {50}


def test_the_clusters_compared_have_equal_cores() -> None:
    from clusters import DISAGGREGATED, colocated, spec

    made = [ClusterSpec.parse(spec("a", pools)) for pools in (colocated(64), DISAGGREGATED)]
    cores = [sum(pool.replicas * pool.resources.cpus for pool in s.pools.values()) for s in made]
    assert cores == [2.0, 2.0]
    assert made[0].pools["both"].chunk_tokens == 64


def test_a_cluster_that_ends_before_ready_says_what_it_said() -> None:
    from clusters import _ready

    printed: queue.Queue[str | None] = queue.Queue()
    for line in ("starting\n", "error: port in use\n", None):
        printed.put(line)
    with pytest.raises(RuntimeError, match="port in use"):
        _ready(printed, until=float("inf"))
    printed.put("READY grpc=127.0.0.1:1 http=127.0.0.1:2\n")
    assert _ready(printed, until=sys.maxsize) == ("127.0.0.1:1", "127.0.0.1:2")
    with pytest.raises(TimeoutError):
        _ready(printed, until=0.0)
