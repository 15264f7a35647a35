"""What constraining every answer costs: tokens a second of one engine, free and with a grammar.

Free, with a JSON schema and with a regex, over the same prompts and for the same number of tokens,
in turn within one run: of several rounds the best of each kind counts.

    python benchmarks/guided.py [--model ID] [--batch 16] [--tokens 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from crossdock.deploy.home import crossdock_home
from crossdock.engine.native.runner import ModelRunner
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.types import Grammar, GrammarKind, SamplingParams

BLOCK_SIZE = 16
# Neither ends before the tokens are drawn: what is compared are steps of equal size.
SCHEMA = """{"type": "array", "minItems": 200, "items": {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 30},
    "größe": {"type": "integer", "minimum": 0, "maximum": 9999},
    "kind": {"enum": ["red", "green", "blue"]},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    "at": {"type": "string", "format": "date"}
  },
  "required": ["name", "größe", "kind"],
  "additionalProperties": false
}}"""
KINDS = {
    "free": None,
    "JSON schema": Grammar(GrammarKind.JSON_SCHEMA, SCHEMA),
    "regex": Grammar(GrammarKind.REGEX, "([A-Z][a-z]{2,12} ){2000}"),
}
PROMPT = "List what is in the warehouse, item by item, with all that is known of each."


def main() -> None:
    """Prints tokens a second of each kind, and their ratio to free."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--home", type=Path, default=crossdock_home())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--temperature", type=float, default=0.7)
    given = parser.parse_args()
    files = resolve(given.model, given.home)
    text = load_text(files)
    length = len(text.encode(PROMPT)) + given.tokens + 1
    blocks = -(-length // BLOCK_SIZE)
    runner = ModelRunner(
        files,
        num_blocks=blocks * given.batch,
        block_size=BLOCK_SIZE,
        device=given.device,
        threads=given.threads,
    )
    runner.warmup()
    best = dict.fromkeys(KINDS, 0.0)
    for _ in range(given.rounds):
        for name, grammar in KINDS.items():
            sequences = prompts(text, grammar, given.batch, blocks, given.temperature)
            best[name] = max(best[name], rate(runner, sequences, given.tokens))
    runner.close()
    print(f"{given.model}, {runner.device}, {given.batch} sequences of {given.tokens} tokens:")
    for name, tokens_s in best.items():
        print(f"  {name:12} {tokens_s:8.1f} tokens/s   {tokens_s / best['free']:.3f} of free")


def prompts(
    text: TextModel, grammar: Grammar | None, batch: int, blocks: int, temperature: float
) -> list[Sequence]:
    """Sequences over block tables of their own."""
    ids = text.encode(PROMPT)
    return [
        Sequence(
            sequence_id=str(i),
            token_ids=list(ids),
            prompt_tokens=len(ids),
            sampling=SamplingParams(temperature=temperature, seed=i, grammar=grammar),
            eos_token_ids=text.eos_token_ids,
            block_table=list(range(i * blocks, (i + 1) * blocks)),
        )
        for i in range(batch)
    ]


def rate(runner: ModelRunner, sequences: list[Sequence], tokens: int) -> float:
    """Tokens a second while all decode: from each one's second token to the last."""
    while any(sequence.num_generated < 1 for sequence in sequences):
        step(runner, [sequence for sequence in sequences if sequence.num_generated < 1])
    drawn, began = 0, time.perf_counter()
    while sequences[0].num_generated < tokens:
        drawn += step(runner, sequences)
    return drawn / (time.perf_counter() - began)


def step(runner: ModelRunner, sequences: list[Sequence]) -> int:
    """Draws a token for each; how many there were."""
    plan = StepPlan(
        tuple(Chunk(each, each.num_computed, each.num_uncomputed, True) for each in sequences)
    )
    drawn = runner.run(plan)
    for sequence, tokens in zip(sequences, drawn):
        sequence.token_ids += [token.token_id for token in tokens]
        sequence.num_computed = sequence.num_tokens - 1
    return sum(map(len, drawn))


if __name__ == "__main__":
    main()
