"""How a worker's memory grows as prompts of new lengths come.

    python benchmarks/memory_curve.py [model] [--longest 256] [--passes 2] [--every 32]

The runner alone computes one prompt of each length, in an order without pattern, and prints what
the process holds for itself (RssAnon of /proc/self/status): its pool and weights are in it, so a
curve that stays flat after the first line is one that is bounded. Linux only.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path

from crossdock.deploy.home import crossdock_home
from crossdock.engine.native.runner import ModelRunner
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.store import resolve
from crossdock.proto.types import SamplingParams

BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--longest", type=int, default=256, help="tokens; also of a chunk")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--every", type=int, default=32, help="lengths between two lines")
    options = parser.parse_args()

    blocks = -(-options.longest // BLOCK_SIZE)
    runner = ModelRunner(
        resolve(options.model, crossdock_home()),
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        threads=1,
    )
    runner.warmup()
    lengths = list(range(1, options.longest + 1))
    random.Random(0).shuffle(lengths)
    print(f"after warm-up: {rss_anon_mb()} MB", flush=True)
    started, tokens = time.perf_counter(), 0
    for done, length in enumerate(lengths * options.passes, start=1):
        ids = random.Random(length).choices(range(runner.config.vocab_size), k=length)
        table = list(range(-(-length // BLOCK_SIZE)))
        prompt = Sequence("prompt", ids, length, SamplingParams(), block_table=table)
        runner.run(StepPlan((Chunk(prompt, 0, length, sample=True),)))
        tokens += length
        if done % options.every == 0:
            rate = tokens / (time.perf_counter() - started)
            print(f"{done:5d} prompts: {rss_anon_mb()} MB, {rate:.0f} tok/s", flush=True)
            started, tokens = time.perf_counter(), 0


def rss_anon_mb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) >> 10  # type: ignore[index]


if __name__ == "__main__":
    main()
