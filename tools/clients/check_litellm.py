"""litellm, with Crossdock as an OpenAI-compatible server."""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks the Internet

import litellm
from checking import BASE_URL, CONTEXT, MODEL, QUESTION, WEATHER, check, raises, run, setting
from pydantic import BaseModel, ConfigDict, Field

ASKED = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "temperature": 0, "max_tokens": 16}


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=100_000_000)


@check
def chat() -> None:
    """completion"""
    answer = litellm.completion(**ASKED, messages=QUESTION)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens


@check
def stream() -> None:
    """stream, put together again"""
    whole = litellm.completion(**ASKED, messages=QUESTION)
    chunks = list(litellm.completion(**ASKED, messages=QUESTION, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert built.choices[0].message.content == whole.choices[0].message.content


@check
async def asynchronous() -> None:
    """acompletion"""
    answer = await litellm.acompletion(**ASKED, messages=QUESTION)
    assert answer.choices[0].message.content


@check
def text() -> None:
    """text_completion with log-probabilities"""
    asked = ASKED | {"model": f"text-completion-openai/{MODEL}", "max_tokens": 3}
    answer = litellm.text_completion(**asked, prompt="One, two,", logprobs=2)
    assert len(answer.choices[0].logprobs.tokens) == 3


@check
def tools() -> None:
    """tools in two turns"""
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = ASKED | {"tools": [WEATHER], "parallel_tool_calls": False, "max_tokens": 60}
    first = litellm.completion(**asked, messages=question, tool_choice="required")
    message = first.choices[0].message
    call = message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
    second = litellm.completion(
        **asked, messages=[*question, message.model_dump(), result], tool_choice="none"
    )
    assert second.choices[0].message.content


@check
def schema() -> None:
    """response_format of a pydantic class"""
    asked = ASKED | {"max_tokens": 80, "response_format": City}
    City.model_validate_json(
        litellm.completion(**asked, messages=QUESTION).choices[0].message.content
    )


@check
def errors() -> None:
    """errors by class, ContextWindowExceededError among them"""
    long = [{"role": "user", "content": "Paris " * (CONTEXT + 1)}]
    raises(litellm.ContextWindowExceededError, lambda: litellm.completion(**ASKED, messages=long))
    unknown = ASKED | {"model": "openai/no", "messages": QUESTION}
    raises(litellm.NotFoundError, lambda: litellm.completion(**unknown))
    stranger = ASKED | {"api_key": "xd-nobody", "messages": QUESTION}
    raises(litellm.AuthenticationError, lambda: litellm.completion(**stranger))
    few = ASKED | {"api_key": setting("CROSSDOCK_KEY_FEW"), "max_retries": 0}
    raises(
        litellm.RateLimitError,
        lambda: [litellm.completion(**few, messages=QUESTION) for _ in range(2)],
    )


@check
def fallback() -> None:
    """a router's fallback, from a model that is not here"""
    at = {"api_base": BASE_URL, "api_key": os.environ["OPENAI_API_KEY"]}
    router = litellm.Router(
        model_list=[
            {"model_name": "first", "litellm_params": {"model": "openai/no", **at}},
            {"model_name": "second", "litellm_params": {"model": f"openai/{MODEL}", **at}},
        ],
        fallbacks=[{"first": ["second"]}],
        num_retries=0,
    )
    answer = router.completion(model="first", messages=QUESTION, max_tokens=4)
    assert answer.choices[0].message.content


if __name__ == "__main__":
    run()
