"""A prefill and a decode worker of vLLM's engine, processes of their own, behind a gateway."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines_kit import simulated
from families import make_gemma, make_moe
from process_kit import Cluster
from prompts import AT_ONCE, prompts
from vllm_alone import undisturbed

from crossdock.client import AsyncClient
from crossdock.proto.types import Grammar, GrammarKind
from crossdock.results import Result

BLOCK, TOKENS = 32, 32
BLOCK_BYTES = 2 * 2 * 2 * 32 * 32 * 4  # of small_llama: layers, K and V, heads, size, tokens


@contextmanager
def cluster_of(model: Path, **settings: object) -> Iterator[Cluster]:
    common = {"block_size": BLOCK, "kv_memory_mb": 64, "engine": simulated("vllm")}
    cluster = Cluster(model, prefills=1, decodes=1, **(common | settings))
    try:
        cluster.start_gateway()
        yield cluster
    finally:
        cluster.close()


def ask(cluster: Cluster, given: Sequence[list[int] | str], **fields: object) -> list[Result]:
    async def answers() -> list[Result]:
        at_once = asyncio.Semaphore(AT_ONCE)
        async with AsyncClient(cluster.grpc) as client:

            async def one(prompt: list[int] | str) -> Result:
                async with at_once:
                    return await client.generate(
                        prompt,
                        **{"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True} | fields,
                        timeout=120.0,
                    )

            return await asyncio.gather(*map(one, given))

    return asyncio.run(answers())


def tokens_of(results: Sequence[Result]) -> list[list[int]]:
    return [list(result.completions[0].token_ids) for result in results]


@pytest.mark.parametrize("transport", ["nixl", "local"])
def test_40_prompts_are_handed_off_and_none_is_computed_again(
    small_llama: Path, transport: str
) -> None:
    given = prompts(40, 2000, 380)
    right = undisturbed(small_llama, given, TOKENS)
    with cluster_of(small_llama, transport=transport) as cluster:
        came = ask(cluster, given)
    assert tokens_of(came) == right
    timings = [result.completions[0].timings for result in came]
    assert sum(each.recomputed_tokens for each in timings) == 0
    for prompt, each in zip(given, timings, strict=True):
        assert each.transferred_blocks == -(-len(prompt) // BLOCK)
        assert each.transferred_bytes == each.transferred_blocks * BLOCK_BYTES


@pytest.mark.parametrize("make", [make_moe, make_gemma])
def test_families_that_the_native_engine_lacks(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = make(tmp_path / "model")
    given = prompts(12, 400, 380)
    right = undisturbed(model, given, TOKENS)
    with cluster_of(model, transport="local") as cluster:
        came = ask(cluster, given)
    assert tokens_of(came) == right
    assert sum(each.completions[0].timings.recomputed_tokens for each in came) == 0
    assert all(each.completions[0].timings.transferred_blocks for each in came)


def test_a_prefix_that_8_requests_share_is_computed_once(small_llama: Path) -> None:
    prefix = prompts(1, 1, 380)[0] + [(5 * i) % 370 + 5 for i in range(639)]
    with cluster_of(small_llama, transport="local") as cluster:
        first, *others = tokens_and_hits(cluster, [[*prefix, 10 + i] for i in range(8)])
    assert first == 0
    assert others == [640] * 7


def tokens_and_hits(cluster: Cluster, given: list[list[int]]) -> list[int]:
    return [ask(cluster, [prompt])[0].usage.cached_tokens for prompt in given]


def test_sampled_and_constrained_answers_go_on_after_the_hand_off(small_llama: Path) -> None:
    """By seed and position, and by what the grammar allows after token 0."""
    given = ["freight " * words for words in (3, 20, 80)]
    sampled = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.3}
    with cluster_of(small_llama, transport="local") as cluster:
        whole = tokens_of(ask(cluster, given, **sampled))
        form = Grammar(GrammarKind.REGEX, "[a-f]{12}")
        formed = ask(cluster, given, grammar=form, temperature=1.0, ignore_eos=False)
        repeated = tokens_of(ask(cluster, given, **sampled))
        greedy = tokens_of(ask(cluster, given))
    assert repeated == whole != greedy
    assert all(re.fullmatch("[a-f]{12}", each.completions[0].text) for each in formed)
    assert all(each.completions[0].timings.transferred_blocks for each in formed)
