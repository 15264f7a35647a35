"""/v1/responses over real sockets: the unmodified `openai` package, and raw bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
import yarl
from gateway_rig import Rig
from http_kit import SAID, post, say
from responses_kit import client_of, end, ending, prompts

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ARGUMENTS = '{"city": "Paris"}'
LOGPROBS: Any = ["message.output_text.logprobs"]
PATH = "/v1/responses"


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(rig) as made:
        yield made


async def refused(rig: Rig, body: Any) -> tuple[int, str, str]:
    status, _, answer = await post(rig, PATH, body)
    return status, answer["error"]["param"], answer["error"]["code"]


# -- whole answers -----------------------------------------------------------------------------


async def test_a_response(rig: Rig, client: openai.AsyncOpenAI, text: Any, model: str) -> None:
    ids = ending(rig, text, SAID)
    response = await client.responses.create(
        model=model, input="hi", instructions="Be brief.", temperature=0, metadata={"k": "v"}
    )
    assert response.output_text == SAID
    assert (response.status, response.object, response.model) == ("completed", "response", model)
    assert response.id.startswith("resp_") and response.error is None
    [item] = response.output
    assert (item.type, item.status, item.role) == ("message", "completed", "assistant")  # type: ignore[union-attr]
    prompt = text.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    )
    assert prompts(rig) == [prompt]
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (len(prompt), len(ids))
    assert usage.total_tokens == len(prompt) + len(ids)
    assert usage.input_tokens_details.cached_tokens == 0
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert (response.instructions, response.metadata) == ("Be brief.", {"k": "v"})
    assert (response.temperature, response.top_p, response.truncation) == (0, 1, "disabled")


async def test_one_that_is_cut_short(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, SAID)
    response = await client.responses.create(model="", input="hi", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]


async def test_calls_are_items(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, f"Let me look.\n{CALL}\n{CALL}")
    response = await client.responses.create(
        model="", input="Weather?", tools=[TOOL], extra_body={"stop": ["never"]}
    )
    _, *calls = response.output
    assert response.output_text == "Let me look."
    assert [call.type for call in calls] == ["function_call"] * 2
    for call in calls:
        assert (call.name, call.arguments) == ("get_weather", ARGUMENTS)  # type: ignore[union-attr]
        assert call.call_id.startswith("call_")  # type: ignore[union-attr]
    # And their results go back by reference to the response.
    ending(rig, text, "It rains.")
    outputs: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}  # type: ignore[union-attr]
        for call in calls
    ]
    after = await client.responses.create(
        model="", input=outputs, tools=[TOOL], previous_response_id=response.id
    )
    assert after.output_text == "It rains."
    shown = text.decode(prompts(rig)[1])
    assert shown.count(f'"arguments": {ARGUMENTS}') == 2 and shown.count("rain\n") == 2


async def test_a_schema(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, '{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    response = await client.responses.create(model="", input="hi", text=form)
    assert json.loads(response.output_text) == {"a": 1}
    grammar = rig.prefills[0].prefills[0].sequence.sampling.grammar
    assert json.loads(grammar.text) == schema


async def test_log_probabilities(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    tokens = len(ending(rig, text, SAID))
    response = await client.responses.create(model="", input="hi", include=LOGPROBS, top_logprobs=2)
    found = response.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert len(found) == tokens and len(found[0].top_logprobs) == 2
    assert found[0].logprob == -0.25


# -- streamed ----------------------------------------------------------------------------------


async def test_streamed(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    said = "Grüße 🙂 Paris"
    ending(rig, text, said)
    stream = await client.responses.create(model="", input="hi", stream=True)
    events = [event async for event in stream]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == said and len(deltas) > 1
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == said and last.response.usage is not None
    for event in events:  # as the package takes what it gets, it does not look at it
        type(event).model_validate(event.to_dict())
    kept = await client.responses.retrieve(last.response.id)
    assert kept.to_dict() == last.response.to_dict()


async def test_streamed_calls(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, f"Look: {CALL}")
    stream = await client.responses.create(model="", input="hi", tools=[TOOL], stream=True)
    events = [event async for event in stream]
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == ARGUMENTS and len(pieces) > 1
    [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert done.arguments == ARGUMENTS
    items = [e.item for e in events if e.type == "response.output_item.done"]
    assert [item.type for item in items] == ["message", "function_call"]
    assert events[-1].response.output == items  # type: ignore[union-attr]


async def test_the_packages_own_accumulation(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    async with client.responses.stream(model="", input="hi") as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).output_text == SAID


async def test_one_that_fails_says_so(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, SAID)
    rig.decodes[0].fail_after[2] = 8  # INTERNAL
    events = [e async for e in await client.responses.create(model="", input="hi", stream=True)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"  # type: ignore[union-attr]
    assert "scripted" in events[-1].response.error.message  # type: ignore[union-attr]


# -- the next turn -----------------------------------------------------------------------------


async def test_a_turn_goes_on_from_the_tokens_of_the_last(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    """Also where the answer, tokenized again, would be made of others."""
    word = [text.encode(letter)[0] for letter in "Paris"]
    assert text.encode(text.decode(word)) != word
    for worker in rig.workers:
        worker.script = [*word, end(text)]
    first = await client.responses.create(model="", input="Where?")
    second = await client.responses.create(model="", input="Sure?", previous_response_id=first.id)
    third = await client.responses.create(
        model="", input="Really?", previous_response_id=second.id, stream=False
    )
    assert third.previous_response_id == second.id
    one, two, three = prompts(rig)
    assert two[: len(one) + len(word)] == one + word
    assert three[: len(two) + len(word)] == two + word
    told = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris"}]
    whole = text.apply_chat_template([*told, {"role": "user", "content": "Sure?"}])
    assert text.decode(two, False) == text.decode(whole, False)


async def test_a_turn_after_one_that_was_cut_short(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    say(rig, text, SAID)
    first = await client.responses.create(model="", input="Where?", max_output_tokens=3)
    await client.responses.create(
        model="", input="Go on", previous_response_id=first.id, max_output_tokens=1
    )
    one, two = prompts(rig)
    drawn = text.encode(SAID)[:3]
    assert two[: len(one) + 3] == one + drawn
    assert two[len(one) + 3] == end(text)


async def test_instructions_are_of_one_turn(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    first = await client.responses.create(model="", input="Where?", instructions="Be brief.")
    await client.responses.create(model="", input="Sure?", previous_response_id=first.id)
    assert prompts(rig)[1] == text.apply_chat_template(
        [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": SAID},
            {"role": "user", "content": "Sure?"},
        ]
    )


async def test_a_conversation_sent_as_items_is_the_same(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    first = await client.responses.create(model="", input="Where?")
    items: Any = [{"role": "user", "content": "Where?"}, *first.output]
    items += [{"role": "user", "content": [{"type": "input_text", "text": "Sure?"}]}]
    await client.responses.create(model="", input=items)
    await client.responses.create(model="", input="Sure?", previous_response_id=first.id)
    assert prompts(rig)[1] == prompts(rig)[2]


# -- what is shown of it ------------------------------------------------------------------------


async def test_input_items(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, SAID)
    items: Any = [{"role": "user", "content": str(i)} for i in range(3)]
    made = await client.responses.create(model="", input=items)
    second = await client.responses.create(model="", input="x", previous_response_id=made.id)
    listed = await client.responses.input_items.list(made.id, limit=2, order="asc")
    assert [item.content[0].text for item in listed.data] == ["0", "1"]  # type: ignore[union-attr]
    assert [i.content[0].text async for i in client.responses.input_items.list(made.id)] == [  # type: ignore[union-attr]
        "2",
        "1",
        "0",
    ]
    assert len((await client.responses.input_items.list(second.id)).data) == 1


@pytest.mark.parametrize("id_", ["x", "resp_", "resp_" + "0" * 48, "%00", "%ff", "r%C3%A9sp"])
async def test_an_id_that_is_none_is_not_found(rig: Rig, id_: str) -> None:
    async with aiohttp.ClientSession() as session:
        for method in ("GET", "DELETE"):
            url = yarl.URL(f"{rig.url}{PATH}/{id_}", encoded=True)
            async with session.request(method, url) as answer:
                assert answer.status == 404


async def test_a_large_conversation_is_gone_on_from_beside_the_loop(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    long = "The capital of France is Paris. " * 140
    first = await client.responses.create(model="", input=long)
    await client.responses.create(model="", input="Sure?", previous_response_id=first.id)
    one, two = prompts(rig)
    assert two[: len(one)] == one and len(one) > 1000


async def test_the_request_comes_back(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, CALL)
    choice: Any = {"type": "function", "name": "get_weather"}
    made = await client.responses.create(
        model="", input="x", tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
    )
    told = made.to_dict()
    assert (told["tools"], told["tool_choice"]) == ([TOOL], choice)
    assert told["parallel_tool_calls"] is False
    assert told["text"] == {"format": {"type": "text"}, "verbosity": "medium"}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": ""}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id"),
        ({"input": ""}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"include": ["all"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"metadata": {"k": 3}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(rig: Rig, body: Any, field: str) -> None:
    asked = body if body.keys() & {"input"} or not body else {"input": "hi"} | body
    status, _, answer = await post(rig, PATH, asked)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert str(answer["error"]["param"]).startswith(field)


async def test_what_changes_nothing_is_accepted(rig: Rig, text: Any) -> None:
    ending(rig, text, SAID)
    body = {
        "input": "hi",
        "background": False,
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": None},
        "text": {"format": {"type": "text"}},
        "service_tier": "auto",
        "user": "u",
        "tools": [],
        "tool_choice": "auto",
        "max_tool_calls": 3,
    }
    status, _, answer = await post(rig, PATH, body)
    assert status == 200 and answer["user"] == "u"


async def test_what_a_stop_string_hid_is_in_no_later_prompt(rig: Rig, text: Any) -> None:
    for worker in rig.workers:
        worker.script = text.encode("Answer END hidden tail")
    _, _, first = await post(rig, PATH, {"input": "hi", "stop": ["END"], "max_output_tokens": 40})
    assert first["output"][0]["content"][0]["text"] == "Answer "
    await post(rig, PATH, {"input": "more", "previous_response_id": first["id"]})
    assert "END" not in text.decode(prompts(rig)[-1], skip_special_tokens=False)


async def test_an_error_under_the_clients_own_name_counts_once(rig: Rig) -> None:
    assert (await refused(rig, {"input": "hi", "max_output_tokens": 0}))[1] == "max_output_tokens"
    assert rig.metric("requests_total", outcome="invalid") == 1


async def test_what_is_not_found_is_told_in_short(rig: Rig) -> None:
    body = {"input": "hi", "previous_response_id": "x" * 1_000_000}
    _, _, answer = await post(rig, PATH, body)
    assert len(answer["error"]["message"]) < 1000
    _, _, answer = await post(rig, PATH, {"input": "hi", "model": "x" * 1_000_000})
    assert len(answer["error"]["message"]) < 1000


async def test_a_next_turn_that_is_too_long_is_refused_before_it_is_tokenized(
    rig: Rig, text: Any
) -> None:
    ending(rig, text, SAID)
    _, _, first = await post(rig, PATH, {"input": "hi"})
    body = {"input": "word " * 400_000, "previous_response_id": first["id"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rig.only.frontend.aside), "call", None)  # fails where it is asked
        status, _, answer = await post(rig, PATH, body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
