"""Answers that must match a grammar, at the front doors: what is asked for, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from engines_kit import simulated, start_engines
from gateway_rig import Rig, ask, refusal, trailer
from http_kit import chat, complete, post

from crossdock.engine.profiles import Profile
from crossdock.proto.errors import Overloaded
from crossdock.proto.types import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, Role
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.frontdoor import grammar_check
from crossdock.router.frontdoor.grammar_check import GrammarChecker

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
# Ten seconds and 500 MB of compiling in 35 bytes.
EXPLODES = {"type": "integer", "multipleOf": 999983}


def told(rig: Rig) -> pb.Grammar:
    """What the workers were told of the last request."""
    return rig.prefills[0].prefills[-1].sequence.sampling.grammar


ASKED = [
        ({"response_format": {"type": "json_object"}}, pb.GRAMMAR_KIND_JSON_OBJECT, ""),
        (
            {"response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
            }},
            pb.GRAMMAR_KIND_JSON_SCHEMA,
            json.dumps(SCHEMA),
        ),
        ({"guided_json": SCHEMA}, pb.GRAMMAR_KIND_JSON_SCHEMA, json.dumps(SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, pb.GRAMMAR_KIND_JSON_SCHEMA, json.dumps(SCHEMA)),
        ({"guided_regex": "a+"}, pb.GRAMMAR_KIND_REGEX, "a+"),
        ({"guided_grammar": 'start: "a"'}, pb.GRAMMAR_KIND_LARK, 'start: "a"'),
        ({"guided_choice": ["a", "ö"]}, pb.GRAMMAR_KIND_CHOICE, '["a", "\\u00f6"]'),
        ({"structured_outputs": {"json": SCHEMA}}, pb.GRAMMAR_KIND_JSON_SCHEMA,
         json.dumps(SCHEMA)),
        ({"structured_outputs": {"regex": "a+", "json": None}}, pb.GRAMMAR_KIND_REGEX, "a+"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, pb.GRAMMAR_KIND_LARK, 'start: "a"'),
        ({"structured_outputs": {"choice": ["a"]}}, pb.GRAMMAR_KIND_CHOICE, '["a"]'),
        ({"structured_outputs": {"json_object": True}}, pb.GRAMMAR_KIND_JSON_OBJECT, ""),
]  # fmt: skip


async def test_workers_are_told(rig: Rig):
    for request_of in (chat, complete):
        for fields, kind, text in ASKED:
            status, _, body = await post(rig, *request_of(max_tokens=2, **fields))
            assert status == 200, body
            assert (told(rig).kind, told(rig).text) == (kind, text), fields


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}, "guided_json_object": False},
        {"guided_json": None, "guided_choice": None, "structured_outputs": None},
    ],
)
async def test_any_text_where_nothing_is_asked_for(rig: Rig, fields: Any):
    status, _, _ = await post(rig, *chat(max_tokens=2, **fields))
    assert status == 200
    assert not rig.prefills[0].prefills[-1].sequence.sampling.HasField("grammar")


REFUSED = [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
            "Invalid type: x",
        ),
        (
            {"response_format": {"type": "json_schema",
                                 "json_schema": {"schema": {}, "strict": "yes"}}},
            "response_format.json_schema.strict",
            "true or false",
        ),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": ["a"]}, "guided_regex", "must be a text"),
        ({"guided_regex": ""}, "guided_regex", "must not be empty"),
        ({"guided_regex": "\ud800"}, "guided_regex", "valid Unicode"),
        ({"guided_json": {"const": "\ud800"}}, "guided_json.const", "valid Unicode"),
        ({"guided_json": "{"}, "guided_json", "must be JSON"),
        ({"guided_json": 3}, "guided_json", "must be a JSON schema"),
        ({"guided_json": {"enum": ["x" * MAX_GRAMMAR_BYTES]}}, "guided_json", "at most"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", 'unknown name: "foo"'),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"guided_choice": "a"}, "guided_choice", "list of texts"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "response_format",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag",
         "not supported"),
        
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs",
         "must be one of"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "ends when it does"),
]  # fmt: skip


async def test_refusals_name_the_field(rig: Rig):
    for fields, param, why in REFUSED:
        status, _, body = await post(rig, *chat(max_tokens=2, **fields))
        assert (status, body["error"]["param"]) == (400, param), (fields, body)
        assert why in body["error"]["message"], fields
    assert not rig.prefills[0].prefills


async def test_a_grammar_that_explodes_is_refused_and_holds_up_nobody(rig: Rig):
    exploding = asyncio.create_task(post(rig, *chat(max_tokens=2, guided_json=EXPLODES)))
    known = {"max_tokens": 2, "guided_choice": ["a"]}
    await post(rig, *chat(**known))  # behind it
    assert exploding.done() or (await exploding)
    status, _, body = exploding.result()
    assert status == 400
    assert "too complex" in body["error"]["message"]
    process = rig.only.grammars._process
    status, _, _ = await post(rig, *chat(max_tokens=2, guided_json=EXPLODES))
    assert status == 400
    assert rig.only.grammars._process is process  # remembered, not tried again


async def test_a_checking_process_that_died_is_started_again(rig: Rig):
    known = {"max_tokens": 2}
    assert (await post(rig, *chat(guided_regex="a", **known)))[0] == 200
    process = rig.only.grammars._process
    assert process is not None
    process.kill()
    process.wait()
    assert (await post(rig, *chat(guided_regex="b", **known)))[0] == 200
    assert rig.only.grammars._process is not process


async def test_too_many_new_grammars_are_turned_away(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar_check, "MAX_WAITING", 0)
    status, headers, _ = await post(rig, *chat(max_tokens=2, guided_choice=["a"]))
    assert (status, headers["Retry-After"]) == (429, "1")


async def test_who_asks_for_many_grammars_holds_up_himself_alone() -> None:
    """Parties take turns, and none may fill the queue."""
    checker = GrammarChecker("simulated", Path())
    asked: list[str] = []
    may, begun = threading.Semaphore(0), threading.Semaphore(0)

    def ask_process(grammar: Grammar) -> str:
        asked.append(grammar.text)
        begun.release()
        assert may.acquire(timeout=60)
        return ""

    checker._ask = ask_process  # type: ignore[method-assign]

    def check(party: str, i: int) -> asyncio.Task[None]:
        grammar = Grammar(GrammarKind.REGEX, f"{party}{i}")
        return asyncio.create_task(checker.check("guided_regex", grammar, party))

    greedy = [check("greedy", i) for i in range(grammar_check.MAX_WAITING_EACH + 3)]
    await asyncio.to_thread(begun.acquire)
    refused = [each for each in greedy if each.done()]
    modest = [check("modest", i) for i in range(2)]
    await asyncio.sleep(0)
    for _ in range(40):
        may.release()
    await asyncio.gather(*(set(greedy) - set(refused)), *modest)
    assert all(isinstance(each.exception(), Overloaded) for each in refused) and len(refused) == 2
    assert asked[:5] == ["greedy0", "greedy1", "modest0", "greedy2", "modest1"]


async def test_a_client_that_goes_away_leaves_the_check_in_order(rig: Rig):
    leaving = asyncio.create_task(post(rig, *chat(max_tokens=2, guided_regex="a")))
    while not rig.only.grammars._turns._taken:
        await asyncio.sleep(0.001)
    leaving.cancel()
    status, _, body = await post(rig, *chat(max_tokens=2, guided_regex="(b"))
    assert (status, body["error"]["param"]) == (400, "guided_regex")


async def test_grpc_takes_and_refuses_the_same(rig: Rig):
    good = pb.Grammar(kind=pb.GRAMMAR_KIND_REGEX, text="a+")
    await rig.stub.GenerateUnary(ask(max_tokens=2, grammar=good))
    assert told(rig) == good
    bad = pb.Grammar(kind=pb.GRAMMAR_KIND_REGEX, text="(a")
    error = await refusal(rig, ask(max_tokens=2, grammar=bad))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailer(error, "error-field") == "sampling.grammar"
    error = await refusal(rig, ask(max_tokens=2, grammar=pb.Grammar(text="a")))
    assert trailer(error, "error-field") == "sampling.grammar.kind"


async def test_over_a_hand_off_and_a_lost_worker_the_answer_is_the_same():
    """Token 0 on a prefill worker, the rest on decode workers of which one is lost on the way."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "minItems": 9, "maxItems": 9},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    grammar = pb.Grammar(kind=pb.GRAMMAR_KIND_JSON_SCHEMA, text=json.dumps(schema))
    request = pb.GenerateRequest(
        text="Give me one. " * 5,
        sampling=pb.SamplingParams(max_tokens=200, seed=4, grammar=grammar),
    )
    async with start_engines(Role.COLOCATED) as alone:
        undisturbed = (await alone.stub.GenerateUnary(request)).completions[0]
    assert undisturbed.finish_reason == pb.FINISH_REASON_STOP
    assert list(json.loads(undisturbed.text)) == ["name", "tags"]
    slow = simulated(profile=Profile(decode_s=0.02))
    async with start_engines(Role.PREFILL, Role.DECODE, Role.DECODE, engine=slow) as rig:
        texts, call = [], rig.stub.Generate(request)
        async for response in call:
            texts.append(response.text)
            if len(texts) == 10:
                [holder] = [
                    w for w in rig.workers if w.config.role is Role.DECODE
                    and (await w.call(lambda role: bool(role.jobs)))
                ]  # fmt: skip
                await holder.stop()
        assert "".join(texts) == undisturbed.text
        assert rig.gateway.metrics.registry.get_sample_value(
            "crossdock_restarted_sequences_total", {"cause": "worker lost"}
        )
