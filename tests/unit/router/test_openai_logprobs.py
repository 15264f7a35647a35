"""Log-probabilities of completions: names of tokens that are no whole characters, and offsets."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

from gateway_rig import Rig, start_rig
from http_kit import complete, events, post, say

from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.openai_format import CompletionAnswer
from crossdock.router.frontdoor.openai_prompt import PromptAnswers

SAID = "Grüße 🙂 Paris"


def top_of(text: Any, ids: list[int]) -> dict[str, float]:
    answer = CompletionAnswer(text, "r", 0, "m", 1, True, False, "fp", PromptAnswers(text, 1))
    found = inference_pb2.TokenLogprobs(chosen=inference_pb2.TokenLogprob(token_id=ids[0]))
    for rank, token_id in enumerate(ids):
        found.top.add(token_id=token_id, logprob=-rank)
    return answer._tokens(0, [found])["top_logprobs"][0]


async def test_others_run_between_the_choices_of_a_whole_answer(text: Any) -> None:
    answer = CompletionAnswer(text, "r", 0, "m", 8, False, False, "fp", PromptAnswers(text, 8))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(others())
    told = json.loads(await answer.told([Delta(index, "x", [1]) for index in range(8)]))
    running.cancel()
    assert len(told["choices"]) == 8 and turns >= 7


def test_partial_characters_have_names_of_their_own(text: Any) -> None:
    ids = [i for i in range(text.vocab_size) if text.token_bytes(i)[:1] >= b"\xf0"][:5]
    assert {text.token_text(i) for i in ids} == {"�"}
    top = top_of(text, ids)
    assert list(top.values()) == [0, -1, -2, -3, -4]
    assert set(top) == {f"bytes:\\x{text.token_bytes(i).hex()}" for i in ids}


def test_tokens_of_one_text_are_told_apart(text: Any) -> None:
    (whole,) = text.encode("a")
    assert list(top_of(text, [whole, whole, whole])) == ["a", "bytes:\\x61", f"token_id:{whole}"]


async def test_offsets_are_those_of_the_text_streamed_or_not(rig: Rig, text: Any) -> None:
    count = say(rig, text, SAID)
    for extra in ({}, {"stop": "Par"}, {"echo": False, "n": 2}):
        path, body = complete(max_tokens=count, logprobs=1, **extra)
        _, _, answer = await post(rig, path, body)
        whole = answer["choices"][0]["logprobs"]
        chunks = [json.loads(e) for e in (await events(rig, path, body | {"stream": True}))[:-1]]
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == 0]
        streamed = [at for part in parts for at in part["logprobs"]["text_offset"]]
        assert streamed == whole["text_offset"]
        for name, at in zip(whole["tokens"], whole["text_offset"]):
            if not name.startswith("bytes:"):
                assert SAID[at:].startswith(name)
        smile = [at for at in whole["text_offset"] if at == SAID.index("🙂")]
        assert len(smile) >= 3  # tokens of one character


async def test_offsets_of_an_echo_are_those_of_the_text_that_was_sent(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Its tokenizer composes characters, and reads what is spelled like a special token as one."""
    folder = tmp_path / "composing"
    shutil.copytree(tiny_model, folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(told | {"normalizer": {"type": "NFC"}}))
    prompt = "cafe\u0301 <|im_end|>hello"
    async with start_rig(folder) as rig:
        for end in (prompt, "hello"):
            body = complete(prompt=end, echo=True, logprobs=0, max_tokens=1)
            _, _, answer = await post(rig, *body)
            (choice,) = answer["choices"]
            found = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]))
            assert choice["text"].startswith(end)
            for name, at in found:
                if "é" not in name and not name.startswith("bytes:"):
                    assert choice["text"][at:].startswith(name), (name, at)
            assert found[-1][1] == len(end)


async def test_a_token_that_completes_the_prompts_character_begins_where_the_text_does(
    rig: Rig, text: Any
) -> None:
    ids = text.encode("a 🙂 b")
    cut = next(at for at in range(1, len(ids)) if "�" in text.decode(ids[:at]))
    for worker in rig.workers:
        worker.script = ids[cut:]
    path, body = complete(prompt=ids[:cut], logprobs=0, max_tokens=len(ids) - cut)
    _, _, answer = await post(rig, path, body)
    (choice,) = answer["choices"]
    assert choice["text"] == "🙂 b"
    for name, at in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]):
        if name.startswith("bytes:"):
            assert at == 0
        else:
            assert choice["text"][at:].startswith(name)
