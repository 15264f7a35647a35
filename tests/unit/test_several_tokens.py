"""Steps that draw none, one or two tokens for a sequence, from the engine to the client."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest
from engines_kit import EngineRig, expected, simulated, start_engines
from gateway_rig import FINISH, ask, collect, ids_of, text_of
from roles_kit import Site, job, undisturbed

from crossdock.engine.profiles import Profile
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb

PROMPT = list(range(40, 90))
PAIR = (Role.PREFILL, Role.DECODE)


@pytest.fixture(params=["two", "uneven"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[EngineRig]:
    kind = "simulated" if request.param == "two" else "uneven"
    async with start_engines(*PAIR, engine=simulated(kind, tokens_per_step=2)) as made:
        yield made


async def generate(rig: EngineRig, ids: list[int], **sampling: object) -> list[pb.GenerateResponse]:
    options = {"temperature": 0.0, "ignore_eos": True} | sampling
    return await collect(rig.stub.Generate(ask(ids, **options)))


async def test_a_stream_has_every_token_once(rig: EngineRig) -> None:
    for tokens in (1, 2, 3, 24, 25):
        responses = await generate(rig, PROMPT, max_tokens=tokens)
        right = expected(PROMPT, tokens)
        assert ids_of(responses) == right
        assert text_of(responses) == rig.text.decode(right)
        last = responses[-1]
        assert last.finish_reason == FINISH.FINISH_REASON_LENGTH
        assert last.usage.completion_tokens == tokens
        assert last.usage.prompt_tokens == len(PROMPT)
        assert last.timings.recomputed_tokens == 0
    await rig.settled()


async def test_tokens_of_one_step_travel_together() -> None:
    async with start_engines(*PAIR, engine=simulated(tokens_per_step=2)) as rig:
        seen = []
        for worker in rig.workers:
            publish = worker._gateways.publish
            worker._gateways.publish = lambda turn, publish=publish: (  # type: ignore[method-assign]
                seen.extend(len(o.token_ids) for outs in turn.outputs.values() for o in outs),
                publish(turn),
            )
        await generate(rig, PROMPT, max_tokens=9)
        assert [count for count in seen if count] == [2, 2, 2, 2, 1]


async def test_logprobs_come_with_each_token(rig: EngineRig) -> None:
    responses = await generate(rig, PROMPT, max_tokens=15, logprobs=2)
    chosen = [entry.chosen.token_id for r in responses for entry in r.logprobs]
    assert chosen == ids_of(responses) == expected(PROMPT, 15)
    assert all(len(entry.top) == 2 for r in responses for entry in r.logprobs)


@pytest.mark.parametrize("at", [0, 1, 2, 7, 8])
async def test_a_stop_token_cuts_what_its_step_drew_after_it(rig: EngineRig, at: int) -> None:
    right = expected(PROMPT, 20)
    stop = right[at]
    responses = await generate(rig, PROMPT, max_tokens=20, stop_token_ids=[stop])
    first = right.index(stop)
    assert ids_of(responses) == right[: first + 1]
    assert text_of(responses) == rig.text.decode(right[:first])
    assert responses[-1].finish_reason == FINISH.FINISH_REASON_STOP
    assert responses[-1].stop_reason == str(stop)
    assert responses[-1].usage.completion_tokens == first + 1
    await rig.settled()


async def test_the_end_token_ends_it(rig: EngineRig) -> None:
    prompt = next(
        ids for i in range(100) if 0 in expected(ids := [50 + i, *PROMPT], 30)[4:]
    )  # an end some way in
    right = expected(prompt, 30)
    responses = await generate(rig, prompt, max_tokens=30, ignore_eos=False)
    assert ids_of(responses) == right[: right.index(0) + 1]
    assert text_of(responses) == rig.text.decode(right[: right.index(0)])


@pytest.mark.parametrize("at", [1, 2, 9])
async def test_a_stop_string_cuts_the_text_before_it(rig: EngineRig, at: int) -> None:
    whole = rig.text.decode(expected(PROMPT, 40))
    stop = whole[at : at + 2]
    responses = await generate(rig, PROMPT, max_tokens=40, stop=[stop])
    assert text_of(responses) == whole[: whole.index(stop)]
    assert responses[-1].stop_reason == stop
    assert responses[-1].usage.completion_tokens == len(ids_of(responses))
    assert rig.text.decode(ids_of(responses)).endswith(stop)
    await rig.settled()


async def test_http_streams_the_same_text(rig: EngineRig) -> None:
    body = {"prompt": PROMPT, "max_tokens": 21, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{rig.url}/v1/completions", json=body) as answer,
    ):
        lines = [line async for line in answer.content if line.startswith(b"data: {")]
    chunks = [json.loads(line[6:]) for line in lines]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == rig.text.decode(expected(PROMPT, 21))
    assert chunks[-1]["usage"]["completion_tokens"] == 21


async def test_a_seed_repeats_its_tokens(rig: EngineRig) -> None:
    runs = [
        ids_of(await generate(rig, PROMPT, max_tokens=12, temperature=1.0, seed=seed))
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] == expected(PROMPT, 12, temperature=1.0, seed=5) != runs[2]


@pytest.mark.parametrize("lost", ["prefill", "decode"])
async def test_a_stream_goes_on_elsewhere_with_the_same_tokens(lost: str) -> None:
    engine = simulated(tokens_per_step=2, profile=Profile(decode_s=0.01, prefill_s=0.01))
    roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    async with start_engines(*roles, engine=engine) as rig:
        call = rig.stub.Generate(ask(PROMPT, max_tokens=61, temperature=0.0, ignore_eos=True))
        responses = [await call.read() for _ in range(4)]
        names = {w.config.name: w for w in rig.workers}
        busy = next(w for w in names.values() if w._role.jobs and w.config.role is Role.DECODE)
        await (busy if lost == "decode" else rig.workers[0]).stop()
        responses += await collect(call)
        assert ids_of(responses) == expected(PROMPT, 61)
        assert responses[-1].usage.completion_tokens == 61


async def test_many_sequences_in_small_pools_are_all_right() -> None:
    """Preempted, prefilled again, cut off by the context: every stream has its own tokens."""
    rng = random.Random(7)
    engine = simulated("uneven", tokens_per_step=2)
    async with start_engines(*PAIR, engine=engine, kv_blocks=24) as rig:
        prompts = [[rng.randrange(1, 250) for _ in range(rng.randrange(1, 90))] for _ in range(24)]
        counts = [rng.randrange(1, 60) for _ in prompts]
        answers = await asyncio.gather(
            *(generate(rig, ids, max_tokens=n) for ids, n in zip(prompts, counts))
        )
        for ids, count, answer in zip(prompts, counts, answers):
            assert ids_of(answer) == expected(ids, count)
        await rig.settled()


def test_the_context_ends_a_sequence_within_a_step() -> None:
    """The pool has no block for a token that nobody will have."""
    site = Site(tokens_per_step=2)
    for length in (509, 510, 511):
        d = site.worker(Role.COLOCATED, blocks=64)
        d.role.submit(job([5] * length, max_tokens=50))
        d.turn(40)
        tokens = [token for output in d.take() for token in output.token_ids]
        assert tokens == undisturbed([5] * length, 512 - length)
        d.check()
        assert d.role.idle and d.role.state.pool.num_used == 0


def test_a_step_may_draw_nothing() -> None:
    """A sequence whose step drew nothing runs its last token again; no token of it is lost."""
    site = Site(tokens_per_step=2)
    d = site.worker(Role.COLOCATED)
    counts = itertools.chain([0, 0, 2, 0, 1], itertools.repeat(2))
    d.runner.tokens_of = lambda chunk: next(counts)  # type: ignore[method-assign]
    d.role.submit(job([5] * 8, max_tokens=6))
    d.turn(12)
    outputs = [list(output.token_ids) for output in d.take()]
    assert [len(tokens) for tokens in outputs] == [2, 1, 2, 1]
    assert [t for tokens in outputs for t in tokens] == undisturbed([5] * 8, 6)
    chunks = [(chunk.start, chunk.length) for plan in d.runner.plans for chunk in plan.chunks]
    assert chunks == [(0, 8), (7, 1), (7, 1), (9, 1), (9, 1), (10, 1), (12, 1)]


def test_blocks_that_two_tokens_fill_are_hashed() -> None:
    site = Site(tokens_per_step=2)
    d = site.worker(Role.COLOCATED)
    d.role.submit(job([5] * 8, max_tokens=24))
    d.turn(30)
    d.take()
    d.role.submit(job([5] * 8 + undisturbed([5] * 8, 20), max_tokens=3))
    d.turn(10)
    (first, *_) = d.take()
    assert first.cached_tokens == 24


def test_what_a_step_drew_is_not_computed_again() -> None:
    site = Site(tokens_per_step=2)
    d = site.worker(Role.COLOCATED)
    d.role.submit(job([5] * 8, max_tokens=24))
    d.turn(30)
    chunks = [(chunk.start, chunk.length) for plan in d.runner.plans for chunk in plan.chunks]
    assert chunks == [(0, 8), *((start, 1) for start in range(9, 31, 2))]
