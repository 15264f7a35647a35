"""Tools over HTTP and over gRPC: the same requests get the same answers."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines_kit import EngineRig, start_engines
from gateway_rig import Rig, start_rig
from http_kit import chat, events, post, say

from crossdock import cli
from crossdock.client import AsyncClient
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind, Role

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
MISTRAL = f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]get_time[CALL_ID]a1[ARGS]{{}}"
HISTORY = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function",
         "function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]  # fmt: skip
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}},
    "required": ["sky"],
    "additionalProperties": False,
}


@dataclass
class Said:
    """What a client was told."""

    content: str
    calls: list[tuple[str, str]]
    finish_reason: str
    ids: list[str]
    pieces: int = 0  # in which the arguments came


Ask = Callable[..., Any]


async def over_http(rig: Any, streamed: bool, messages: Any, **fields: Any) -> Said:
    if (schema := fields.pop("schema", None)) is not None:
        wrapped = {"name": "s", "schema": schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": wrapped}
    path, body = chat(messages=messages, stream=streamed, **fields)
    if not streamed:
        status, _, answer = await post(rig, path, body)
        if status != 200:
            raise InvalidRequest(answer["error"]["param"], None, answer["error"]["message"])
        [choice] = answer["choices"]
        calls = choice["message"].get("tool_calls", [])
        named = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        content, ids = choice["message"]["content"] or "", [call["id"] for call in calls]
        return Said(content, named, choice["finish_reason"], ids)
    found = Said("", [], "", [])
    for line in (await events(rig, path, body))[:-1]:
        [choice] = json.loads(line)["choices"]
        found.content += choice["delta"].get("content") or ""
        found.finish_reason = choice["finish_reason"] or ""
        for piece in choice["delta"].get("tool_calls", []):
            function = piece["function"]
            gain(found, piece["index"], piece.get("id"), function.get("name"),
                 function["arguments"])  # fmt: skip
    return found


async def over_grpc(rig: Any, streamed: bool, messages: Any, **fields: Any) -> Said:
    if (schema := fields.pop("schema", None)) is not None:
        fields["grammar"] = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    async with AsyncClient(rig.gateway.grpc_address) as client:
        if not streamed:
            answer = await client.generate(messages, **fields)
            calls = answer.tool_calls
            named = [(call.name, call.arguments) for call in calls]
            return Said(answer.text, named, str(answer.finish_reason), [c.id for c in calls])
        found = Said("", [], "", [])
        async for chunk in client.stream(messages, **fields):
            found.content += chunk.text
            found.finish_reason = str(chunk.finish_reason or "")
            for call in chunk.tool_calls:
                gain(found, call.index, call.id, call.name, call.arguments)
        return found


def gain(found: Said, index: int, id_: str | None, name: str | None, arguments: str) -> None:
    if id_:
        assert index == len(found.calls) and name
        found.calls.append((name, ""))
        found.ids.append(id_)
    found.calls[index] = (found.calls[index][0], found.calls[index][1] + arguments)
    found.pieces += bool(arguments)


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest) -> Ask:
    return over_http if request.param == "http" else over_grpc


@pytest.mark.parametrize("streamed", [False, True])
async def test_calls_are_read_out_of_the_text(
    rig: Rig, text: Any, door: Ask, streamed: bool
) -> None:
    tokens = say(rig, text, f"Look:\n{CALL}\n{CALL}")
    # A stop string that never comes keeps text back, and is not what ends the answer.
    asked = partial(door, rig, streamed, ASKED, max_tokens=tokens + 1)
    eos = min(text.eos_token_ids)
    for worker in rig.workers:
        assert worker.script is not None
        worker.script.append(eos)
    said = await asked(tools=TOOLS)
    assert said.content == "Look:" and said.finish_reason == "tool_calls"
    assert said.calls == [("get_weather", ARGUMENTS)] * 2
    assert len(set(said.ids)) == 2 and all(each.startswith("call_") for each in said.ids)
    assert not streamed or said.pieces > 4, "as it is written"
    told = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids)
    plain = await asked(tools=TOOLS, tool_choice="none")
    assert (plain.content, plain.calls, plain.finish_reason) == (
        f"Look:\n{CALL}\n{CALL}",
        [],
        "stop",
    )
    bare = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids)
    assert "Weather of a city" in told and "Weather of a city" not in bare
    cut = await door(rig, streamed, ASKED, tools=TOOLS, max_tokens=tokens // 2)
    assert cut.finish_reason == "length"


async def test_both_doors_show_the_template_the_same(rig: Rig, text: Any) -> None:
    say(rig, text, "x")
    for fields in (
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": [TIME], "chat_template_kwargs": {"a": 1}},
    ):
        await over_http(rig, False, HISTORY, max_tokens=1, **fields)
        if (variables := fields.pop("chat_template_kwargs", None)) is not None:
            fields["template_kwargs"] = variables
        await over_grpc(rig, False, HISTORY, max_tokens=1, **fields)
        first, second = (
            list(request.sequence.token_ids) for request in rig.prefills[0].prefills[-2:]
        )
        assert first == second


@pytest.mark.parametrize("streamed", [False, True])
async def test_newer_models_of_mistral(
    tiny_model: Path, text: Any, door: Ask, streamed: bool
) -> None:
    async with start_rig(tiny_model, tool_parser="mistral_args") as rig:
        tokens = say(rig, text, f"Look: {MISTRAL}")
        said = await door(rig, streamed, ASKED, tools=TOOLS, max_tokens=tokens)
    assert said.content == "Look:"
    assert said.calls == [("get_weather", ARGUMENTS), ("get_time", "{}")]
    assert all(len(each) == 9 for each in said.ids)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [TIME, TIME]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"function": {"name": "x"}, "type": "function"}},
     "tool_choice"),
    ({"tools": [{"type": "function", "function": {
        "name": "x", "strict": True, "parameters": {"not": {}}}}], "tool_choice": "required"},
     "tools"),
    ({"tools": TOOLS, "schema": {"not": {}}}, ""),
]  # fmt: skip


async def test_what_cannot_be_is_refused_alike(rig: Rig, door: Ask) -> None:
    for fields, named in REFUSED:
        with pytest.raises(InvalidRequest) as error:
            await door(rig, False, ASKED, max_tokens=2, **fields)
        field = error.value.field.removeprefix("chat.")
        known = ("sampling.grammar", "response_format.json_schema.schema")
        assert field.startswith(named) if named else field in known, (fields, field)
    assert not rig.prefills[0].prefills


@pytest.fixture
async def engines() -> AsyncIterator[EngineRig]:
    async with start_engines(Role.PREFILL, Role.DECODE, kv_memory_mb=512) as rig:
        yield rig


async def test_what_must_be_called_is_and_a_form_holds_for_what_is_no_call(
    engines: EngineRig,
) -> None:
    """On an engine that draws at random."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for streamed in (False, True):
        fields = {"tools": TOOLS, "max_tokens": 400}
        by_http, by_grpc = [
            [
                await door(engines, streamed, HISTORY, **fields, **more)
                for more in (
                    {"tool_choice": named, "seed": 1},
                    {"tool_choice": "required", "parallel_tool_calls": False, "seed": 2},
                    *({"schema": SCHEMA, "seed": seed} for seed in range(6)),
                )
            ]
            for door in (over_http, over_grpc)
        ]
        for first, second in zip(by_http, by_grpc):
            assert (first.content, first.calls, first.finish_reason) == (
                second.content,
                second.calls,
                second.finish_reason,
            )
        assert [call[0] for call in by_http[0].calls] == ["get_weather"]
        assert len(by_http[1].calls) == 1
        for said in by_http[2:]:
            if said.calls:
                assert said.finish_reason == "tool_calls" and not said.content
            else:
                assert json.loads(said.content)["sky"] in ("blue", "grey")


async def test_the_command_line_shows_calls_and_takes_their_results(
    rig: Rig, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tokens = say(rig, text, f"{CALL}\n{CALL}")
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the weather?\nrain\nsun\n/exit\n"))
    arguments = ["--target", rig.gateway.grpc_address, "--tools", str(tools)]
    arguments += ["--max-tokens", str(tokens)]
    assert await asyncio.to_thread(cli.main, ["chat", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"get_weather({ARGUMENTS})") == 4, "two answers of two calls"
    told = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids)
    assert len(rig.prefills[0].prefills) == 2, "both results go together"
    assert told.index("rain") < told.index("sun") and told.count(CALL) == 2
