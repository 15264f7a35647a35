"""Answers under generated JSON schemas, from a real cluster: how many that finish are valid.

Schemas drawn at random (tests/kits/schemas.py: nested, enums, arrays, optional fields, several
scripts), each asked for once by a chat over HTTP, half of them greedily. All of it twice: the
second time the decode worker that is busiest at half of the answers is killed, and every answer
must be what it was the first time.

    python benchmarks/schemas_cluster.py --count 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
from clusters import DEFAULT_MODEL, running, spec

from crossdock.deploy import admin
from crossdock.proto.v1 import worker_pb2

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kits"))
from schemas import random_schema

POOLS = """\
  prefill: {role: prefill, replicas: 1, resources: {cpus: 1}}
  decode:  {role: decode,  replicas: 2, resources: {cpus: 1}}
"""
DEADLINE_S = 600.0
FIRST_SEED = 1000


@dataclass(frozen=True)
class Answer:
    """What one schema's chat came to."""

    text: str
    finish_reason: str
    tokens: int


async def ask(session: aiohttp.ClientSession, url: str, seed: int, most: int, depth: int) -> Answer:
    """Raises ClientError for an answer that is none."""
    form = {"name": "answer", "schema": random_schema(FIRST_SEED + seed, depth), "strict": True}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Describe something as JSON."}],
        "temperature": float(seed % 2 == 0),
        "seed": seed,
        "max_tokens": most,
        "response_format": {"type": "json_schema", "json_schema": form},
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        told = await response.json()
        if response.status != 200:
            raise aiohttp.ClientError(f"schema {seed}: {told}")
    choice = told["choices"][0]
    tokens = told["usage"]["completion_tokens"]
    return Answer(choice["message"]["content"], choice["finish_reason"], tokens)


async def ask_all(
    url: str, given: argparse.Namespace, at_half: Callable[[], None] = lambda: None
) -> list[Answer]:
    """One answer for each schema, `given.concurrency` at once."""
    answers: dict[int, Answer] = {}
    left = iter(range(given.count))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session:

        async def client() -> None:
            for seed in left:
                answers[seed] = await ask(session, url, seed, given.max_tokens, given.depth)
                if len(answers) == given.count // 2:
                    await asyncio.to_thread(at_half)

        await asyncio.gather(*(client() for _ in range(given.concurrency)))
    return [answers[seed] for seed in range(given.count)]


def kill_busiest(address: str) -> None:
    """SIGKILL for the decode worker with the most sequences."""
    workers = admin.status(address).workers
    decoding = [each for each in workers if each.role == worker_pb2.ROLE_DECODE]
    busiest = max(decoding, key=lambda each: each.worker.load.running)
    os.kill(busiest.pid, signal.SIGKILL)
    print(f"killed {busiest.name}, which decoded {busiest.worker.load.running} sequences")


def invalid(answers: list[Answer], depth: int) -> list[str]:
    """What is wrong with the answers that finished."""
    found = []
    for seed, answer in enumerate(answers):
        if answer.finish_reason != "stop":
            continue
        schema = random_schema(FIRST_SEED + seed, depth)
        try:
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
        except (ValueError, jsonschema.ValidationError) as error:
            found.append(f"schema {seed}: {error}")
    return found


def main() -> int:
    """Prints what was found; 1 where an answer is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--count", type=int, default=200, help="schemas")
    parser.add_argument("--depth", type=int, default=2, help="of what is nested in an object")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--verbose", action="store_true", help="shows what the cluster says")
    given = parser.parse_args()
    yaml = spec(f"schemas-{os.getpid()}", POOLS, given.model)
    rounds: list[list[Answer]] = []
    with running(yaml, verbose=given.verbose) as cluster:
        for at_half in (lambda: None, lambda: kill_busiest(cluster.admin)):
            began = time.monotonic()
            answers = asyncio.run(ask_all(f"http://{cluster.http}", given, at_half))
            seconds, tokens = time.monotonic() - began, sum(each.tokens for each in answers)
            finished = sum(each.finish_reason == "stop" for each in answers)
            print(f"{given.count} schemas in {seconds:.0f} s, {tokens / seconds:.1f} tokens/s: "
                  f"{finished} answers finished", flush=True)  # fmt: skip
            rounds.append(answers)
    wrong = [line for answers in rounds for line in invalid(answers, given.depth)]
    pairs = enumerate(zip(*rounds, strict=True))
    other = [f"schema {seed}: {a} and then {b}" for seed, (a, b) in pairs if a != b]
    print(f"finished and not valid: {len(wrong)}; other than without the kill: {len(other)}")
    for line in [*wrong, *other][:20]:
        print(f"FAILED {line}")
    return bool(wrong or other)


if __name__ == "__main__":
    sys.exit(main())
