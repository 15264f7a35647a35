"""langchain-openai: ChatOpenAI and OpenAI."""

from __future__ import annotations

from checking import MODEL, check, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

chat_model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=80)
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=100_000_000)


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: 18 degrees, sunny"


@check
def invoke() -> None:
    """invoke"""
    answer = chat_model.invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.usage_metadata["total_tokens"]


@check
def stream() -> None:
    """stream"""
    chunks = list(chat_model.stream(QUESTION))
    assert len(chunks) > 1
    assert "".join(chunk.content for chunk in chunks) == chat_model.invoke(QUESTION).content


@check
def batch() -> None:
    """batch"""
    assert len(chat_model.batch([QUESTION, "And of Spain?"])) == 2


@check
async def asynchronous() -> None:
    """ainvoke"""
    assert (await chat_model.ainvoke(QUESTION)).content


@check
def tools() -> None:
    """bind_tools in two turns"""
    asking = chat_model.bind_tools(
        [get_weather], tool_choice="get_weather", parallel_tool_calls=False
    )
    question = HumanMessage("What is the weather in Paris?")
    message = asking.invoke([question])
    call = message.tool_calls[0]
    assert call["name"] == "get_weather" and "city" in call["args"]
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    assert chat_model.invoke([question, message, result]).content


@check
def schema() -> None:
    """with_structured_output"""
    for method in ("json_schema", "function_calling"):
        asking = chat_model.with_structured_output(City, method=method)
        assert isinstance(asking.invoke(QUESTION), City)


@check
def logprobs() -> None:
    """log-probabilities"""
    answer = chat_model.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"]) == 3


@check
def completions() -> None:
    """completions"""
    assert OpenAI(model=MODEL, max_tokens=4).invoke("One, two,")


if __name__ == "__main__":
    run()
