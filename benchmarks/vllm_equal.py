"""Whether vLLM's engine in these pools answers as vLLM alone does, and how its KV is handed over.

Prompts of 1 to --longest random token ids, greedy, 8 at a time: first by `LLM.generate`, then by
one prefill and one decode worker over NIXL. Tokens are compared; bytes moved, recomputed tokens,
pull rate and fence latency are told. Ends with 1 where anything differs.

    make vllm
    .venv/bin/python benchmarks/vllm_equal.py
    .venv/bin/python benchmarks/vllm_equal.py --resources '{gpus: 0.5}'   # both workers on one GPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "vllm"))

import clusters
from prompts import AT_ONCE, prompts
from vllm_alone import undisturbed

from crossdock.client import Client
from crossdock.deploy.home import crossdock_home
from crossdock.model.export import export_model
from crossdock.results import Result

VOCABULARY = 49_000  # of the default model, a little less
POOLS = """\
  prefill: {{role: prefill, replicas: 1, resources: {0}, engine: {{kind: vllm}}}}
  decode:  {{role: decode,  replicas: 1, resources: {0}, engine: {{kind: vllm}}}}
kv: {{transport: nixl, block_size: 32}}
"""


def served(yaml: str, asked: list[list[int]], tokens: int) -> list[Result]:
    """What a cluster of this YAML answers."""
    with clusters.running(yaml) as cluster, Client(cluster.grpc) as client:

        def ask(prompt: list[int]) -> Result:
            options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            return client.generate(prompt, timeout=600, **options)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, asked))


def show(found: list[Result], equal: int) -> None:
    """What came of it, and of the hand-offs."""
    timings = [each.timings for each in found]
    moved = [each for each in timings if "pulled" in each.events]
    pull_s = [each.events["pulled"] - each.events["reserved"] for each in moved]
    fence_s = [each.events["fenced"] - each.events["pulled"] for each in moved]
    late = sum(each.late_bytes for each in moved)
    blocks = sum(each.transferred_blocks for each in timings)
    nbytes = sum(each.transferred_bytes for each in timings)
    print(f"{equal} of {len(found)} answers equal vLLM's own")
    print(f"{nbytes} bytes = {blocks} blocks x {nbytes / max(1, blocks):.10g}")
    print(f"{sum(each.recomputed_tokens for each in timings)} prompt tokens recomputed")
    print(f"after token 0: {late / sum(pull_s) / 1e9:.2f} GB/s", end="; ")
    print(f"fence p50 {1000 * statistics.median(fence_s):.2f} ms, with the decode loop's wait")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=clusters.DEFAULT_MODEL, help="a known model, or a file")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--longest", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--resources", default="{cpus: 1}", help="of each worker, as in YAML")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asked = prompts(options.prompts, options.longest, VOCABULARY, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        model = export_model(options.model, Path(scratch, "model"), crossdock_home())
        alone = undisturbed(model, asked, options.tokens)
        yaml = clusters.spec("vllm-equal", POOLS.format(options.resources), str(model))
        found = served(yaml.replace("dtype: auto", "dtype: float32"), asked, options.tokens)
    pairs = zip(found, alone, strict=True)
    equal = sum(list(each.completions[0].token_ids) == ids for each, ids in pairs)
    show(found, equal)
    return 0 if equal == len(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
