"""The tests of test_fence.py over two ranks a side, which test_ranks.py runs in a process of its
own: there the side that pulls is, and another process has the one that offers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fence_kit import Far, Made, Pair, Side, check_refused, check_unfenced, serve_prefill

END_S = 20.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    made = Made(Path(os.environ["MODEL"]), ranks=2, transport="nixl")
    spawn = multiprocessing.get_context("spawn")
    link, theirs = spawn.Pipe()
    process = spawn.Process(target=serve_prefill, args=(made, theirs))
    process.start()
    theirs.close()
    decode = Side(made)
    yield Pair(Far(link), decode)
    link.close()
    decode.close()
    process.join(END_S)
    assert process.exitcode == 0


def test_blocks_that_two_ranks_rewrote_are_refused_200_times_of_200(pair: Pair) -> None:
    check_refused(pair, 200)


def test_without_the_fence_wrong_tokens_are_drawn(pair: Pair) -> None:
    check_unfenced(pair, 20)
