"""OpenAI's Python library."""

from __future__ import annotations

import concurrent.futures
import json

import openai
from checking import CONTEXT, MODEL, QUESTION, WEATHER, check, raises, run, setting
from pydantic import BaseModel, Field

client = openai.OpenAI(max_retries=0)


class City(BaseModel):
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=100_000_000)


@check
def models() -> None:
    """models"""
    assert MODEL in [each.id for each in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def chat() -> None:
    """chat"""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=16
    )
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"


@check
def stream() -> None:
    """stream"""
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(**asked) as events:
        assert events.get_final_completion().choices[0].message.content == text


@check
def several() -> None:
    """n = 2 by seed"""
    asked = {"model": MODEL, "messages": QUESTION, "n": 2, "seed": 7, "max_tokens": 8}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    assert [each.index for each in first.choices] == [0, 1]
    assert [each.message.content for each in first.choices] == [
        each.message.content for each in again.choices
    ]


@check
def completions() -> None:
    """completions"""
    answer = client.completions.create(
        model=MODEL, prompt=["One, two,", [504, 253]], max_tokens=4, temperature=0, stop=["\n"]
    )
    assert len(answer.choices) == 2
    streamed = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=4, temperature=0, stop=["\n"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


@check
def logprobs() -> None:
    """log-probabilities"""
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in content)
    assert content[0].token == content[0].top_logprobs[0].token
    text = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=3, temperature=0, logprobs=2
    )
    found = text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 3


@check
def tools() -> None:
    """tools in two turns"""
    asked = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_tokens": 60}
    asked["parallel_tool_calls"] = False
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = client.chat.completions.create(**asked, messages=question, tool_choice="required")
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
    second = client.chat.completions.create(
        **asked, messages=[*question, message, result], tool_choice="none"
    )
    assert second.choices[0].message.content


@check
def streamed_tools() -> None:
    """streamed tools"""
    with client.chat.completions.stream(
        model=MODEL,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=60,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    ) as events:
        pieces = [
            each.arguments_delta
            for each in events
            if each.type == "tool_calls.function.arguments.delta"
        ]
        answer = events.get_final_completion()
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.arguments == "".join(pieces)
    assert set(json.loads(call.function.arguments)) == {"city"}


@check
def parse() -> None:
    """chat.completions.parse with a schema"""
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=80
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@check
def parsed_tool() -> None:
    """parse with a strict tool"""
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me of a city."}],
        tools=[openai.pydantic_function_tool(City, name="tell")],
        tool_choice={"type": "function", "function": {"name": "tell"}},
        max_tokens=80,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, City)


@check
def errors() -> None:
    """errors by class"""
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 1}
    unknown = raises(
        openai.NotFoundError, lambda: client.chat.completions.create(**asked | {"model": "no"})
    )
    assert unknown.code == "model_not_found"
    long = raises(
        openai.BadRequestError,
        lambda: client.completions.create(model=MODEL, prompt=[504] * (CONTEXT + 1)),
    )
    assert long.code == "context_length_exceeded"
    wrong = raises(openai.BadRequestError, lambda: client.chat.completions.create(**asked, top_p=2))
    assert wrong.param == "top_p"
    stranger = client.with_options(api_key="xd-nobody")
    refused = raises(openai.AuthenticationError, lambda: stranger.chat.completions.create(**asked))
    assert refused.code == "invalid_api_key"


@check
def not_offered() -> None:
    """embeddings and moderations refused"""
    asked = raises(
        openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="Hello")
    )
    assert asked.code == "not_offered"
    raises(openai.NotFoundError, lambda: client.moderations.create(input="Hello"))


@check
def rate_limits() -> None:
    """429, and its retry"""
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 1}
    few = client.with_options(api_key=setting("CROSSDOCK_KEY_FEW"))  # one request a minute
    refused = raises(
        openai.RateLimitError,
        lambda: [few.chat.completions.create(**asked) for _ in range(2)],
    )
    assert refused.code == "rate_limit_exceeded"
    assert refused.response.headers["x-ratelimit-limit-requests"] == "1"
    assert int(refused.response.headers["retry-after"]) > 0
    # One sequence at a time: of several at once all but one are refused, and come again.
    patient = client.with_options(api_key=setting("CROSSDOCK_KEY_ONE"), max_retries=20)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: patient.chat.completions.create(**asked), range(3)))
    assert all(each.choices for each in answers)


@check
async def cancelled() -> None:
    """asynchronous, and a stream left early"""
    async with openai.AsyncOpenAI() as other:
        stream = await other.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=500, stream=True
        )
        async for _ in stream:
            break
        await stream.close()
        answer = await other.completions.create(model=MODEL, prompt="Hello", max_tokens=2)
        assert answer.usage.completion_tokens == 2


if __name__ == "__main__":
    run()
