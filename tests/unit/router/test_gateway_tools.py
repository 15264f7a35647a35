"""Tools at the HTTP front door, with the openai package: offered, called, answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from engines_kit import EngineRig, start_engines
from gateway_rig import Rig, refusal, trailer
from http_kit import chat, events, post, say

from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Paris", "Rome"]},
                    "days": {"$ref": "#/$defs/days"},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 1}}\n</tool_call>'
)
ARGUMENTS = '{"city": "Paris", "days": 1}'


def client_of(rig: Rig | EngineRig) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0)


async def test_a_call_is_read_out_of_the_text(rig: Rig, text: Any) -> None:
    tokens = say(rig, text, f"Let me look.\n{CALL}")
    async with client_of(rig) as client:
        answer = await client.chat.completions.create(
            model="", messages=ASKED, tools=TOOLS, max_tokens=tokens, stop=["never"]
        )
    message = answer.choices[0].message
    assert message.content == "Let me look."
    [call] = message.tool_calls or []
    assert (call.type, call.function.name) == ("function", "get_weather")  # type: ignore[union-attr]
    assert call.function.arguments == ARGUMENTS  # type: ignore[union-attr]
    assert call.id.startswith("call_")


async def test_a_streamed_call_comes_as_it_is_written(rig: Rig, text: Any) -> None:
    tokens = say(rig, text, f"Look: {CALL}\n{CALL}")
    path, body = chat(messages=ASKED, tools=TOOLS, max_tokens=tokens, stream=True)
    deltas = [
        json.loads(line)["choices"][0]["delta"] for line in (await events(rig, path, body))[:-1]
    ]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == "Look:"
    assert not any("tool_call" in (delta.get("content") or "") for delta in deltas)
    calls: dict[int, dict[str, Any]] = {}
    pieces = 0
    for delta in deltas:
        for piece in delta.get("tool_calls", []):
            call = calls.setdefault(piece["index"], {"arguments": ""})
            if "id" in piece:
                call |= {"id": piece["id"], "name": piece["function"]["name"]}
            call["arguments"] += piece["function"]["arguments"]
            pieces += 1
    assert [call["arguments"] for call in calls.values()] == [ARGUMENTS] * 2
    assert calls[0]["id"] != calls[1]["id"]
    assert pieces > 6


async def test_the_template_that_knows_no_tools_is_told_of_them(rig: Rig, text: Any) -> None:
    say(rig, text, "x")
    history = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain <|im_end|>"},
    ]  # fmt: skip
    status, _, body = await post(rig, *chat(messages=history, tools=TOOLS, max_tokens=1))
    assert status == 200, body
    ids = rig.prefills[0].prefills[-1].sequence.token_ids
    shown = text.decode(ids, skip_special_tokens=False)
    assert '"name": "get_weather"' in shown and "Weather of a city" in shown
    assert CALL in shown
    assert "<tool_response>\nrain <|im_end|>\n</tool_response>" in shown
    [end] = text.ids_of(["<|im_end|>"])
    assert list(ids).count(end) == 4  # system, user, assistant, the tool's: not what the tool said


async def test_without_a_choice_of_tools_nothing_is_offered(rig: Rig, text: Any) -> None:
    tokens = say(rig, text, CALL)
    request = chat(messages=ASKED, tools=TOOLS, tool_choice="none", max_tokens=tokens)
    _, _, body = await post(rig, *request)
    assert body["choices"][0]["message"]["content"] == CALL
    shown = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids)
    assert "get_weather" not in shown


REFUSED = [
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice.function.name",
    ),
    ({"tools": TOOLS, "guided_grammar": 'start: "a"'}, "guided_grammar"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
     "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "x"}]},
     "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
     "messages[0].tool_calls[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[" + "{}," * 70_000 + "{}]"}}]}]},
     "messages.tool_calls"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {
        "name": "x", "strict": True, "parameters": {"not": {}}}}]}, "tools"),
]  # fmt: skip


async def test_refusals_name_the_field(rig: Rig) -> None:
    for fields, param in REFUSED:
        status, _, body = await post(rig, *chat(max_tokens=2, **fields))
        assert (status, body["error"]["param"]) == (400, param), (fields, body)
    assert not rig.prefills[0].prefills


async def test_a_final_message_goes_on(rig: Rig, text: Any) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "The weather "}]
    fields = {"continue_final_message": True, "reasoning_effort": "low",
              "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    status, _, body = await post(rig, *chat(messages=begun, max_tokens=1, **fields))
    assert status == 200, body
    shown = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids, False)
    assert shown.endswith("<|im_start|>assistant\nThe weather ")


async def test_grpc_takes_calls_in_the_history(rig: Rig, text: Any) -> None:
    call = pb.ToolCall(id="call_1", name="get_weather", arguments=ARGUMENTS)
    messages = [
        pb.ChatMessage(role="user", content="What is the weather?", name="Ann"),
        pb.ChatMessage(role="assistant", tool_calls=[call]),
        pb.ChatMessage(role="tool", tool_call_id="call_1", content="rain"),
        pb.ChatMessage(role="assistant", content="It is "),
    ]
    chatted = pb.Chat(messages=messages, continue_final_message=True, template_kwargs='{"a": 1}')
    request = pb.GenerateRequest(chat=chatted, sampling=pb.SamplingParams(max_tokens=1))
    await rig.stub.GenerateUnary(request)
    shown = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids, False)
    assert CALL in shown and shown.endswith("It is ")
    request.chat.template_kwargs = "[]"
    assert trailer(await refusal(rig, request), "error-field") == "chat.template_kwargs"


async def test_half_a_character_in_arguments_ends_no_conversation(rig: Rig, text: Any) -> None:
    """A model wrote them; they are shown as they came. In a schema, which a client wrote, they are
    refused under its field."""
    half = '{"city": "\\ud83d"}'
    function = {"name": "get_weather", "arguments": half}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [*ASKED, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]  # fmt: skip
    status, _, body = await post(rig, *chat(messages=messages, max_tokens=1))
    assert status == 200, body
    shown = text.decode(rig.prefills[0].prefills[-1].sequence.token_ids, False)
    assert json.dumps(half)[1:-1] in shown
    chatted = pb.Chat(
        messages=[pb.ChatMessage(role="user", content="hi")],
        tools=[pb.Tool(name="x", parameters=half)],
    )
    error = await refusal(rig, pb.GenerateRequest(chat=chatted))
    assert trailer(error, "error-field") == "chat.tools[0].parameters"


@pytest.fixture
async def engines() -> AsyncIterator[EngineRig]:
    async with start_engines(Role.PREFILL, Role.DECODE, kv_memory_mb=512) as rig:
        yield rig


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_round_trip_of_two_turns(engines: EngineRig, streamed: bool) -> None:
    """On an engine that draws at random: what must be called is, with arguments that validate."""
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    messages: list[Any] = list(ASKED)
    async with client_of(engines) as client:
        call = await answer_of(client, streamed, messages, tool_choice=named)
        assert call["finish_reason"] == "tool_calls"
        [made] = call["tool_calls"]
        assert made["function"]["name"] == "get_weather"
        arguments = json.loads(made["function"]["arguments"])
        assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
        messages += [
            {"role": "assistant", "content": None, "tool_calls": call["tool_calls"]},
            {"role": "tool", "tool_call_id": made["id"], "content": "rain"},
        ]
        last = await answer_of(client, streamed, messages, max_tokens=20)
        assert last["content"] and last["finish_reason"] in ("length", "stop")
        required = await answer_of(client, streamed, messages, tool_choice="required", seed=2)
        assert required["finish_reason"] == "tool_calls"
        assert {c["function"]["name"] for c in required["tool_calls"]} <= {
            "get_weather",
            "get_time",
        }
        one = await answer_of(
            client, streamed, messages, tool_choice="required", parallel_tool_calls=False
        )
        assert len(one["tool_calls"]) == 1


async def answer_of(
    client: openai.AsyncOpenAI, streamed: bool, messages: list[Any], **fields: Any
) -> dict[str, Any]:
    """Content, calls and finish_reason, streamed or not."""
    given = {"model": "", "messages": messages, "tools": TOOLS, "seed": 1, "max_tokens": 1000}
    create: Any = client.chat.completions.create
    if not streamed:
        [choice] = (await create(**given | fields)).choices
        return choice.message.model_dump(exclude_none=True) | {
            "finish_reason": choice.finish_reason
        }
    found: dict[str, Any] = {"content": "", "tool_calls": []}
    async for chunk in await create(**given | fields, stream=True):
        [choice] = chunk.choices
        found["content"] += choice.delta.content or ""
        found["finish_reason"] = choice.finish_reason
        for piece in choice.delta.tool_calls or []:
            if piece.id:
                function = {"name": piece.function.name, "arguments": ""}
                found["tool_calls"].append(
                    {"id": piece.id, "type": "function", "function": function}
                )
            found["tool_calls"][piece.index]["function"]["arguments"] += piece.function.arguments
    return found
