"""A session of many turns on real roles and simulated engines: what of its history is found."""

from __future__ import annotations

import openai
import pytest
from engines_kit import EngineRig, start_engines

from crossdock.kvcache.block_pool import BlockPool
from crossdock.proto.types import Role

TURNS = 10


Told = tuple[list[float], list[str]]


async def session(
    rig: EngineRig, turns: int = TURNS, first: int = 8, answer_tokens: int = 40
) -> Told:
    """The part of each turn's history that was found in a cache, from the second on; and what was
    answered. The first message is `first` times as long as the others."""
    found, answers, history, previous = [], [], 0, None
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none") as client:
        for turn in range(turns):
            said = "Tell me of freight and of trains. " * (first if turn == 0 else 1)
            response = await client.responses.create(
                model="",
                input=said,
                previous_response_id=previous,
                max_output_tokens=answer_tokens,
                temperature=0,
            )
            usage, previous = response.usage, response.id
            assert usage is not None
            if turn:
                found.append(usage.input_tokens_details.cached_tokens / history)
            answers.append(response.output_text)
            history = usage.total_tokens
    return found, answers


async def test_a_session_finds_its_history_in_the_cache() -> None:
    async with start_engines(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE) as rig:
        found, _ = await session(rig)
        assert min(found) >= 0.9
        await rig.settled()


async def test_a_short_one_finds_the_block_too_that_its_last_answer_ended_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 64 tokens, of which its history fills the last in part."""
    roles = Role.PREFILL, Role.DECODE
    async with start_engines(*roles, block_size=64) as rig:
        found, answers = await session(rig, 4, 1)
        assert min(found) >= 0.98
        await rig.settled()
    monkeypatch.setattr(BlockPool, "acquire_tail", lambda *_: None)
    async with start_engines(*roles, block_size=64) as rig:
        found, computed = await session(rig, 4, 1)
        assert min(found) < 0.9 and computed == answers


async def test_a_short_answer_is_gone_on_from_where_it_was_given() -> None:
    """It fills no block more than its prompt, which a prefill worker has as well."""
    async with start_engines(Role.PREFILL, Role.DECODE, Role.DECODE, block_size=64) as rig:
        found, _ = await session(rig, 4, 2, 5)
        assert min(found) >= 0.98


async def test_workers_of_both_phases_find_it_too() -> None:
    async with start_engines(Role.COLOCATED) as rig:
        found, _ = await session(rig, 3)
        assert min(found) >= 0.9
