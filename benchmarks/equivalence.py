"""Greedy tokens of a running cluster against those of transformers, token by token.

Sends prompts of 1 to 2,000 tokens, 8 at a time, at temperature 0. Each answer is then laid under
transformers' logits, teacher-forced: where the likeliest token is not the one that came, the two
logits are compared; closer than 1e-3 is a tie (float32 sums in another order), else a mismatch.

    python benchmarks/equivalence.py --target 127.0.0.1:50051 --model smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdock.bench.run import describe_machine
from crossdock.client import AsyncClient
from crossdock.deploy.home import crossdock_home
from crossdock.model.store import ModelFiles, resolve
from crossdock.model.text import load_text

TIE = 1e-3
TEXT = Path(__file__).resolve().parent.parent / "LICENSE"


@dataclass(frozen=True)
class Compared:
    prompt_tokens: int
    tokens: int
    ties: int
    mismatches: int
    largest_gap: float  # by which logit the token that came trailed the likeliest


def prompts(count: int, longest: int, english: list[int], seed: int = 0) -> list[list[int]]:
    """Lengths from 1 to `longest`, even in their logarithm; English and random ids in turn."""
    rng = np.random.default_rng(seed)
    lengths = np.unique(np.geomspace(1, longest, count).round().astype(int)).tolist()
    while len(lengths) < count:
        lengths.append(int(rng.integers(1, longest + 1)))
    made = []
    for index, length in enumerate(lengths):
        if index % 2:
            made.append([int(each) for each in rng.integers(1000, 30000, length)])
        else:
            start = int(rng.integers(max(1, len(english) - length)))
            made.append((english * 2)[start : start + length])
    return made


async def answers(options: argparse.Namespace, given: list[list[int]]) -> list[tuple[int, ...]]:
    at_once = asyncio.Semaphore(options.concurrency)

    async with AsyncClient(options.target) as client:

        async def ask(prompt: list[int]) -> tuple[int, ...]:
            async with at_once:
                result = await client.generate(
                    token_ids=prompt,
                    temperature=0.0,
                    max_tokens=options.output_len,
                    ignore_eos=True,
                    timeout=900.0,
                )
                return result.token_ids

        return await asyncio.gather(*map(ask, given))


def reference(files: ModelFiles) -> Any:
    """The same weights by transformers, in float32; a GGUF is read by transformers' own reader."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    if files.format == "hf":
        return AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(files.path.parent, gguf_file=files.path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = load_gguf_checkpoint(str(files.path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    lacking = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if lacking or unexpected:
        raise RuntimeError(f"{files.path}: lacks {sorted(lacking)}, has unknown {unexpected}")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def compare(model: Any, prompt: list[int], answer: tuple[int, ...]) -> Compared:
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits = model(ids, logits_to_keep=len(answer)).logits[0].float()  # [answer, vocab]
    came = logits[torch.arange(len(answer)), torch.tensor(answer)]
    gaps = (logits.max(dim=-1).values - came).tolist()
    return Compared(
        prompt_tokens=len(prompt),
        tokens=len(answer),
        ties=sum(0 < gap <= TIE for gap in gaps),
        mismatches=sum(gap > TIE for gap in gaps),
        largest_gap=max(gaps),
    )


def main() -> int:
    options = arguments()
    files = resolve(options.model, crossdock_home())
    english = load_text(files).encode(TEXT.read_text())
    given = prompts(options.prompts, options.longest, english)
    started = time.perf_counter()
    came = asyncio.run(answers(options, given))
    print(f"{len(came)} answers in {time.perf_counter() - started:.1f} s", flush=True)
    model = reference(files)
    rows = [compare(model, prompt, answer) for prompt, answer in zip(given, came)]
    for row in rows:
        if row.ties or row.mismatches:
            print(
                f"prompt of {row.prompt_tokens}: {row.ties} ties, {row.mismatches} mismatches, "
                f"largest gap {row.largest_gap:.2e}"
            )
    short = sum(row.tokens != options.output_len for row in rows)
    totals = {
        "prompts": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "ties": sum(row.ties for row in rows),
        "mismatches": sum(row.mismatches for row in rows),
        "answers_of_wrong_length": short,
    }
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in totals.items()))
    if options.json:
        report = {"machine": describe_machine(), **totals, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if totals["mismatches"] or short else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="127.0.0.1:50051", help="the gateway, host:port")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what it serves")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--longest", type=int, default=2000, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
