"""Log-probabilities of completions: names of tokens that are no whole characters, and offsets."""

from __future__ import annotations

import json
from typing import Any

from gateway_rig import Rig
from http_kit import complete, events, post, say

from crossdock.proto.v1 import inference_pb2
from crossdock.router.frontdoor.openai_format import CompletionAnswer
from crossdock.router.frontdoor.openai_prompt import PromptAnswers

SAID = "Grüße 🙂 Paris"


def top_of(text: Any, ids: list[int]) -> dict[str, float]:
    answer = CompletionAnswer(text, "r", 0, "m", 1, True, False, "fp", PromptAnswers(text, 1))
    found = inference_pb2.TokenLogprobs(chosen=inference_pb2.TokenLogprob(token_id=ids[0]))
    for rank, token_id in enumerate(ids):
        found.top.add(token_id=token_id, logprob=-rank)
    return answer._tokens(0, [found])["top_logprobs"][0]


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
