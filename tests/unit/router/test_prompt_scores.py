"""Log-probabilities of prompts through the gateway: echo, max_tokens 0, prompt_logprobs."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from fake_worker import score_of
from gateway_rig import PROMPT, Rig, ask, collect, refusal, start_rig, until
from http_kit import chat, complete, events, post, say

from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import worker_pb2
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.best_of import best

IDS = [*range(40, 90), 200, 210]  # of 200 and up: bytes that are no whole characters


def logprobs_of(ids: list[int]) -> list[float | None]:
    return [None, *(score_of(token_id, at) for at, token_id in enumerate(ids) if at)]


async def choices(rig: Rig, **body: Any) -> list[Any]:
    status, _, answer = await post(rig, *complete(**body))
    assert status == 200, answer
    return list(answer["choices"])


async def test_an_echoed_prompt_has_the_log_probabilities_of_its_tokens(
    rig: Rig, text: Any
) -> None:
    for prompt in (IDS, "a café, twice"):
        ids = prompt if isinstance(prompt, list) else text.encode(prompt)
        said = text.decode(ids) if isinstance(prompt, list) else prompt
        (choice,) = await choices(rig, prompt=prompt, echo=True, logprobs=2, max_tokens=1)
        told = choice["logprobs"]
        assert choice["text"].startswith(said) and choice["finish_reason"] == "length"
        assert {len(values) for values in told.values()} == {len(ids) + 1}
        assert told["token_logprobs"] == [*logprobs_of(ids), -0.25]
        assert told["top_logprobs"][0] is None
        for place, (name, tops) in enumerate(zip(told["tokens"], told["top_logprobs"])):
            if 0 < place < len(ids):  # the two best, and the one that is there
                assert len(tops) in (2, 3) and name in tops
        ends = zip(told["tokens"], told["text_offset"])
        whole = [(name, at) for name, at in ends if not name.startswith("bytes:")]
        assert all(choice["text"][at:].startswith(name) for name, at in whole)
        assert all(a <= b for a, b in pairwise(told["text_offset"]))
        assert told["text_offset"][len(ids)] == len(said)


@pytest.mark.parametrize("logprobs", [None, 0, 1])
async def test_no_token_is_drawn_where_none_is_asked_for(
    rig: Rig, text: Any, logprobs: int | None
) -> None:
    body: dict[str, Any] = {"prompt": IDS, "echo": True, "logprobs": logprobs, "max_tokens": 0}
    status, _, answer = await post(rig, *complete(**body))
    assert status == 200
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text.decode(IDS), "length")
    assert answer["usage"]["prompt_tokens"] == len(IDS) == answer["usage"]["total_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    assert (choice["logprobs"] is None) == (logprobs is None)
    if logprobs is not None:
        assert choice["logprobs"]["token_logprobs"] == logprobs_of(IDS)
    assert not rig.decodes[0].decodes and len(rig.prefills[0].prefills) == 1
    await until(lambda: rig.idle)
    streamed = await events(rig, *complete(**body, stream=True))
    (event,) = [json.loads(each) for each in streamed[:-1]]
    assert event["choices"] == [choice]


async def test_streams_several_prompts_and_continuations_say_the_same(rig: Rig, text: Any) -> None:
    body = {"prompt": [IDS, "hello you", IDS[:1]], "n": 2, "echo": True, "logprobs": 1}
    body |= {"max_tokens": 3, "seed": 1, "temperature": 0}
    whole = await choices(rig, **body)
    assert [choice["index"] for choice in whole] == list(range(6))
    for choice in whole:
        ids = (IDS, text.encode("hello you"), IDS[:1])[choice["index"] // 2]
        assert choice["logprobs"]["token_logprobs"][: len(ids)] == logprobs_of(ids)
    scored = [p.sequence.sampling.HasField("prompt_logprobs") for p in rig.prefills[0].prefills]
    assert len(scored) == 6 and sum(scored) == 3  # the second continuation shares the first's
    found: dict[int, dict[str, Any]] = {}
    for event in (await events(rig, *complete(**body, stream=True)))[:-1]:
        for choice in json.loads(event)["choices"]:
            kept = found.setdefault(choice["index"], {"text": "", "logprobs": {}})
            kept["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                kept["logprobs"].setdefault(name, []).extend(values)
    assert [found[i] for i in range(6)] == [
        {"text": choice["text"], "logprobs": choice["logprobs"]} for choice in whole
    ]


async def test_prompt_logprobs_as_vllm_gives_them(rig: Rig, text: Any) -> None:
    (choice,) = await choices(rig, prompt=IDS, prompt_logprobs=2, max_tokens=1)
    assert choice["logprobs"] is None and len(choice["prompt_logprobs"]) == len(IDS)
    assert choice["prompt_logprobs"][0] is None
    for at, (token_id, told) in enumerate(zip(IDS, choice["prompt_logprobs"])):
        if at:
            best = [str((at + i) % 100) for i in range(2)]
            assert list(told) == [str(token_id), *(b for b in best if b != str(token_id))]
            chosen = told[str(token_id)]
            assert (chosen["logprob"], chosen["rank"]) == (score_of(token_id, at), 2)
            assert chosen["decoded_token"] == text.token_text(token_id)
    (none,) = await choices(rig, prompt=IDS, prompt_logprobs=0, max_tokens=0)
    assert [len(told) for told in none["prompt_logprobs"][1:]] == [1] * (len(IDS) - 1)
    status, _, answer = await post(rig, *chat(prompt_logprobs=1, max_tokens=2))
    assert status == 200 and "prompt_logprobs" not in answer["choices"][0]
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    (plain,) = await choices(rig, prompt=IDS, max_tokens=1)
    assert "prompt_logprobs" not in plain


async def test_grpc_says_the_same_streamed_or_not(rig: Rig) -> None:
    request = ask(IDS, n=2, max_tokens=2, prompt_logprobs=3, temperature=0.0)
    whole = await rig.stub.GenerateUnary(request)
    responses = await collect(rig.stub.Generate(request))
    for index, completion in enumerate(whole.completions):
        told = list(completion.prompt_logprobs)
        assert [item.chosen.token_id for item in told] == IDS[1:]
        assert [item.chosen.logprob for item in told] == logprobs_of(IDS)[1:]
        assert all([top.rank for top in item.top] == [1, 2, 3] for item in told)
        mine = [r for r in responses if r.index == index]
        assert [item for r in mine for item in r.prompt_logprobs] == told
        assert mine[0].prompt_logprobs and not mine[0].token_ids
    only = await rig.stub.GenerateUnary(ask(IDS, max_tokens=0, prompt_logprobs=0))
    assert only.usage == pb.Usage(prompt_tokens=len(IDS)) and not only.completions[0].token_ids
    assert only.completions[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert "at least 1, or 0 where" in (await refusal(rig, ask(max_tokens=0))).details()


async def test_what_a_lost_worker_scored_is_told_once(tiny_model: Any) -> None:
    """The next one goes on where it stopped; a prompt that was scored is not scored again."""
    async with start_rig(tiny_model, prefills=2, decodes=1) as rig:
        for worker in rig.prefills:
            worker.scored_early = 20
            worker.token_0.clear()
        call = rig.stub.Generate(ask(IDS, max_tokens=4, prompt_logprobs=1, temperature=0.0))
        await until(lambda: any(worker.prefills for worker in rig.prefills))
        first = next(worker for worker in rig.prefills if worker.prefills)
        (state,) = [
            s
            for served in rig.gateway._all()
            for a in served.dispatcher._requests
            for s in a.sequences
        ]
        await until(lambda: state.scored == 20)
        for worker in rig.prefills:
            worker.token_0.set()
        first.token_0.clear()
        await first.stop()
        rig.decodes[0].fail_after[2] = worker_pb2.ERROR_CODE_PREEMPTED
        responses = await collect(call)
        told = [item.chosen.logprob for r in responses for item in r.prompt_logprobs]
        assert told == logprobs_of(IDS)[1:]
        other = next(worker for worker in rig.prefills if worker is not first)
        assert [p.sequence.scored_tokens for p in other.prefills] == [20, len(IDS)]
        assert [d.sequence.scored_tokens for d in rig.decodes[0].decodes] == [len(IDS)] * 2


async def test_a_scored_prompt_is_not_sent_where_it_is_cached(tiny_model: Any) -> None:
    """What is scored is computed whole, so nothing speaks for the worker that has it cached."""
    async with start_rig(tiny_model, prefills=1, decodes=1) as rig:
        await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
        cached = (await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))).usage.cached_tokens
        answer = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1, prompt_logprobs=0))
        assert (cached > 0, answer.usage.cached_tokens) == (True, 0)


def test_the_best_are_those_with_the_highest_mean() -> None:
    def delta(index: int, *logprobs: float) -> Delta:
        told = [pb.TokenLogprobs(chosen=pb.TokenLogprob(logprob=each)) for each in logprobs]
        usage = pb.Usage(prompt_tokens=7, completion_tokens=len(told), cached_tokens=index)
        return Delta(index, f"{index}", [], told, usage=usage)

    first = [delta(0, -1, -1), delta(1, -1.5), delta(2, -0.5, -0.5, -0.5), delta(3, -4, 0)]
    second = [delta(4, -1), delta(5, -1), delta(6, -2), delta(7, -3)]
    found = best([*first, *second], 2, 4)
    assert [(d.index, d.text) for d in found] == [(0, "2"), (1, "0"), (2, "4"), (3, "5")]
    assert found[0].usage == pb.Usage(prompt_tokens=7, completion_tokens=8)
    assert found[2].usage == pb.Usage(prompt_tokens=7, completion_tokens=4, cached_tokens=4)
    assert found[1].usage == found[3].usage == pb.Usage()


async def test_more_are_made_than_answered(rig: Rig, text: Any) -> None:
    say(rig, text, "no! well, ")
    body = {"prompt": "x", "n": 2, "best_of": 4, "max_tokens": 6, "temperature": 1}
    status, _, answer = await post(rig, *complete(**body))
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 4 * 6
    assert len(rig.prefills[0].prefills) == 4
    unary = await rig.stub.GenerateUnary(
        pb.GenerateRequest(text="x", n=1, best_of=3, sampling=pb.SamplingParams(max_tokens=2))
    )
    assert (len(unary.completions), unary.usage.completion_tokens) == (1, 6)
    assert not unary.completions[0].logprobs
    request = pb.GenerateRequest(text="x", best_of=17)
    assert "from n = 1 to 16" in (await refusal(rig, request)).details()
    (same,) = await choices(rig, prompt="x", best_of=1, max_tokens=1)
    assert same["text"]


async def test_log_probabilities_without_alternatives(rig: Rig, text: Any) -> None:
    """logprobs: 0, and top_logprobs: 0: the token that is there, alone."""
    (choice,) = await choices(rig, prompt=IDS, logprobs=0, max_tokens=2)
    told = choice["logprobs"]
    assert told["token_logprobs"] == [-0.25, -1.25]
    assert [list(best.values()) for best in told["top_logprobs"]] == [[-0.25], [-1.25]]
    for extra in ({}, {"top_logprobs": 0}):
        _, _, answer = await post(rig, *chat(logprobs=True, max_tokens=2, **extra))
        content = answer["choices"][0]["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in content] == [[], []]
        assert [entry["logprob"] for entry in content] == [-0.25, -1.25]
    _, _, answer = await post(rig, *chat(logprobs=False, top_logprobs=0, max_tokens=2))
    assert answer["choices"][0]["logprobs"] is None


async def test_what_lm_eval_asks_for_and_reads(rig: Rig) -> None:
    """Its local-completions: batches of token ids, of which it sums what follows the context."""
    contexts, prompts = [3, 10], [IDS[:20], IDS]
    body = {
        "model": "", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    found = await choices(rig, **body)
    for choice, context, ids in zip(sorted(found, key=lambda c: c["index"]), contexts, prompts):
        told = choice["logprobs"]
        summed = sum(told["token_logprobs"][context:-1])
        assert summed == sum(logprobs_of(ids)[context:])  # type: ignore[arg-type]
        best = [max(top.values()) for top in told["top_logprobs"][context:-1]]
        assert best == [-0.125] * (len(ids) - context)


async def test_scoring_alone_is_accounted(rig: Rig) -> None:
    await choices(rig, prompt=IDS, echo=True, logprobs=1, max_tokens=0)
    await until(lambda: rig.idle)
    assert rig.metric("requests_total", outcome="ok") == 1
    families = rig.gateway.metrics.registry.collect()
    used = {
        sample.name.removeprefix("crossdock_tenant_"): sample.value
        for family in families
        for sample in family.samples
        if "tenant" in sample.labels
    }
    assert (used["requests_total"], used["prompt_tokens_total"]) == (1, len(IDS))
    assert used["generated_tokens_total"] == 0 and used["worker_seconds_total"] > 0
