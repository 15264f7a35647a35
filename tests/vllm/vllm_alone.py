"""What vLLM alone answers, greedy: in a process of its own, which leaves nothing behind in ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def undisturbed(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """`tokens` ids after each prompt, by `LLM.generate`, 8 at a time."""
    asked = json.dumps({"model": str(model), "prompts": prompts, "tokens": tokens})
    done = subprocess.run(
        [sys.executable, __file__], input=asked, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        block_size=32,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        language_model_only=True,
        kv_cache_memory_bytes=512 << 20,
    )
    greedy = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = llm.generate(prompts, greedy, use_tqdm=False)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":
    main()
