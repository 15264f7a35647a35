"""Tensor parallelism on the CPU: two ranks a worker, each a process with a part of every block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from engines_kit import simulated
from freeze import freeze
from process_kit import Cluster, until
from prompts import prompts
from test_hand_off import BLOCK, BLOCK_BYTES, TOKENS, ask, cluster_of, tokens_of
from vllm_alone import undisturbed

TWO = {"engine": simulated("vllm", args={"tensor_parallel_size": 2})}
END_S = 20.0
SHM = Path("/dev/shm")


def left_behind() -> set[Path]:
    """Shared memory of ranks, which a worker that is killed would leave."""
    return {path for name in ("crossdock-ranks-*", "psm_*") for path in SHM.glob(name)}


def children(pid: int) -> list[int]:
    """Processes that this one started and that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def in_a_step(cluster: Cluster, rank: int) -> None:
    """Has the other ranks wait for that one: it stands still while a request is decoded."""

    def asked() -> None:
        with suppress(Exception):  # the cluster ends before it does
            ask(cluster, [[5, 6, 7]])

    freeze(rank)
    threading.Thread(target=asked, daemon=True).start()
    worker = cluster.workers["decode-0"]
    until(lambda: worker.used_blocks(), END_S, "the request is there")
    time.sleep(0.5)  # and its step has begun


def test_two_ranks_answer_as_one_does_and_die_together(small_llama: Path) -> None:
    given = prompts(16, 700, 380)
    right = undisturbed(small_llama, given, TOKENS)
    before = left_behind()
    with cluster_of(small_llama, transport="nixl", **TWO) as cluster:
        came = ask(cluster, given)
        assert not left_behind() - before
        layout = cluster.workers["decode-0"].status().description.layout
        pids = {name: worker.pid for name, worker in cluster.workers.items()}
        ((of_prefill,), (of_decode,)) = (children(pids[name]) for name in ("prefill-0", "decode-0"))
        in_a_step(cluster, of_decode)
        os.kill(of_decode, signal.SIGKILL)
        until(lambda: not alive(pids["decode-0"]), END_S, "the worker of a dead rank ends")
        freeze(of_prefill)
        cluster.kill("prefill-0")
        until(lambda: not alive(of_prefill), END_S, "a rank of a dead worker ends, however it is")
        del cluster.workers["decode-0"]
    assert tokens_of(came) == right
    assert (layout.tp_degree, layout.kv_heads) == (2, 2)
    timings = [result.completions[0].timings for result in came]
    assert sum(each.recomputed_tokens for each in timings) == 0
    for prompt, each in zip(given, timings, strict=True):
        assert each.transferred_blocks == -(-len(prompt) // BLOCK)
        assert each.transferred_bytes == each.transferred_blocks * BLOCK_BYTES


@pytest.mark.parametrize("tests", ["two_ranks.py", "two_ranks_fence.py"])
def test_two_ranks_hold_to_what_one_does(small_llama: Path, tests: str) -> None:
    """In a process of their own: one takes part in one group of ranks only."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(tests))],
        env=os.environ | {"MODEL": str(small_llama)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
