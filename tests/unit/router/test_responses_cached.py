"""A session of many turns on real roles and simulated engines: what of its history is found."""

from __future__ import annotations

import openai
from engines_kit import EngineRig, start_engines

from crossdock.proto.types import Role

TURNS = 10


async def session(rig: EngineRig, turns: int = TURNS) -> list[float]:
    """The part of each turn's history that was found in a cache, from the second on."""
    found, history, previous = [], 0, None
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none") as client:
        for turn in range(turns):
            said = "Tell me of freight and of trains. " * (8 if turn == 0 else 1)
            response = await client.responses.create(
                model="", input=said, previous_response_id=previous, max_output_tokens=40
            )
            usage, previous = response.usage, response.id
            assert usage is not None
            if turn:
                found.append(usage.input_tokens_details.cached_tokens / history)
            history = usage.total_tokens
    return found


async def test_a_session_finds_its_history_in_the_cache() -> None:
    async with start_engines(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE) as rig:
        found = await session(rig)
        assert min(found) >= 0.9
        await rig.settled()


async def test_workers_of_both_phases_find_it_too() -> None:
    async with start_engines(Role.COLOCATED) as rig:
        assert min(await session(rig, 3)) >= 0.9
