"""The engine in one worker: its tokens are vLLM's, whatever the steps they were computed in."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engines_kit import simulated, start_engines
from gateway_rig import ask, collect, ids_of
from prompts import AT_ONCE, prompts
from vllm_alone import undisturbed

from crossdock.proto.types import Role


async def test_40_prompts_get_the_tokens_of_vllm_alone(small_llama: Path) -> None:
    given, tokens = prompts(40, 2000, 380), 32
    right = await asyncio.to_thread(undisturbed, small_llama, given, tokens)
    options = {"block_size": 32, "chunk_tokens": 256, "kv_memory_mb": 64}
    rig = start_engines(Role.COLOCATED, model=str(small_llama), engine=simulated("vllm"), **options)
    async with rig as engines:
        at_once = asyncio.Semaphore(AT_ONCE)

        async def answer(prompt: list[int]) -> list[int]:
            async with at_once:
                asked = ask(prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True)
                return ids_of(await collect(engines.stub.Generate(asked)))

        came = await asyncio.gather(*map(answer, given))
        await engines.settled()
    assert came == right
