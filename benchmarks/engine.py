"""How fast one worker's engine is, beside what this machine allows in the same run.

    python benchmarks/engine.py [model] [--threads 1] [--context 300]

Decode and prefill steps of the runner alone, no scheduler and no network. Two limits stand beside
each: `gemm`, the same matrix products of the model back to back and nothing else; and, for decode
on a CPU, `read`, the weights streamed once from memory. A ratio of 1 to `gemm` means that
attention, norms and everything else cost nothing.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch

from crossdock.deploy.home import crossdock_home
from crossdock.engine.native.linear import Linear, make_linear
from crossdock.engine.native.runner import ModelRunner
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.config import ModelConfig
from crossdock.model.store import resolve
from crossdock.proto.types import SamplingParams

BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=300, help="tokens before a decode step")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill step")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    started = time.perf_counter()
    room = max(2048, 16 * (options.context + BLOCK_SIZE)) // BLOCK_SIZE + 16
    runner = ModelRunner(
        resolve(options.model, crossdock_home()),
        num_blocks=room,
        block_size=BLOCK_SIZE,
        threads=options.threads,
    )
    loaded = time.perf_counter()
    runner.warmup()
    print(f"load {loaded - started:.2f} s, warm-up {time.perf_counter() - loaded:.2f} s")
    bench = Bench(runner, options.repeats)
    with torch.inference_mode():
        print(
            f"read {bench.read_gbs:.1f} GB/s, {bench.weight_bytes / 1e6:.0f} MB of weights a step"
        )
        for count in (1, 8, 16):
            bench.decode(count, options.context)
        for tokens in (280, 1024, 2048):
            bench.prefill(min(tokens, runner.config.context_length), options.chunk)


class Bench:
    def __init__(self, runner: ModelRunner, repeats: int) -> None:
        self._runner, self._repeats = runner, repeats
        self._gemm = BareProducts(runner.config, runner.dtype, runner.device)
        self.weight_bytes = self._gemm.elements * runner.dtype.itemsize
        block = torch.zeros(1 << 26, device=runner.device)
        self.read_gbs = block.nbytes / self._best(block.sum)[0] / 1e9

    def decode(self, count: int, context: int) -> None:
        blocks = -(-context // BLOCK_SIZE)
        sequences = [self._sequence(context, i * blocks) for i in range(count)]
        plan = StepPlan(tuple(Chunk(s, context - 1, 1, True) for s in sequences))
        step, gemm = self._best(
            lambda: self._runner.run(plan), lambda: self._gemm.run(count, count)
        )
        read = self.weight_bytes / self.read_gbs / 1e9
        print(
            f"decode {count:3d} × ctx {context}: {count / step:7.1f} tok/s, step {step * 1e3:6.1f} "
            f"ms; gemm {gemm * 1e3:6.1f} ms (ratio {gemm / step:.2f}), "
            f"read {read * 1e3:.1f} ms (ratio {read / step:.2f})"
        )

    def prefill(self, tokens: int, chunk: int) -> None:
        sequence = self._sequence(tokens, 0)
        starts = range(0, tokens, chunk)
        plans = [
            StepPlan((Chunk(sequence, s, min(chunk, tokens - s), s + chunk >= tokens),))
            for s in starts
        ]

        def bare() -> None:
            for plan in plans:
                self._gemm.run(plan.num_tokens, int(plan.chunks[0].sample))

        step, gemm = self._best(lambda: [self._runner.run(plan) for plan in plans], bare)
        print(
            f"prefill {tokens:4d} by {chunk}: {tokens / step:7.1f} tok/s, gemm "
            f"{tokens / gemm:7.1f} tok/s (ratio {gemm / step:.2f})"
        )

    def _sequence(self, tokens: int, first_block: int) -> Sequence:
        ids = random.Random(tokens).choices(range(self._runner.config.vocab_size), k=tokens)
        blocks = list(range(first_block, first_block - (-tokens // BLOCK_SIZE)))
        return Sequence("bench", ids, tokens, GREEDY, block_table=blocks)

    def _best(self, *works: Callable[[], object]) -> list[float]:
        """Least seconds of each, taken in turn so that a noisy minute hits all alike."""
        times: list[list[float]] = [[] for _ in works]
        for _ in range(self._repeats + 1):
            for taken, work in zip(times, works):
                started = time.perf_counter()
                work()
                if self._runner.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
        return [min(taken[1:]) for taken in times]


class BareProducts:
    """The matrix products of one step, with weights of their own, so that they come from memory
    as the model's do."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = (
            (config.query_size + 2 * config.kv_size, hidden),
            (hidden, config.query_size),
            (2 * inner, hidden),
            (hidden, inner),
        )
        self._dtype, self._device = dtype, device
        self._layers = [
            [(columns, self._linear(rows, columns)) for rows, columns in shapes]
            for _ in range(config.num_layers)
        ]
        self._head, self._hidden = self._linear(config.vocab_size, hidden), hidden
        per_layer = sum(rows * columns for rows, columns in shapes)
        self.elements = per_layer * config.num_layers + config.vocab_size * hidden

    def run(self, rows: int, sampled: int) -> None:
        for layer in self._layers:
            for columns, linear in layer:
                linear(torch.ones(rows, columns, dtype=self._dtype, device=self._device))
        if sampled:
            self._head(torch.ones(sampled, self._hidden, dtype=self._dtype, device=self._device))

    def _linear(self, rows: int, columns: int) -> Linear:
        return make_linear(torch.full((rows, columns), 0.5, dtype=self._dtype, device=self._device))


if __name__ == "__main__":
    main()
