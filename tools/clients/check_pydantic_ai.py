"""pydantic-ai: an agent with a schema and a tool."""

from __future__ import annotations

from checking import MODEL, check, run
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel

chat_model = OpenAIChatModel(MODEL, settings=ModelSettings(temperature=0, max_tokens=80))
QUESTION = "What is the capital of France?"


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=100_000_000)


@check
def text() -> None:
    """an agent's text"""
    result = Agent(chat_model).run_sync(QUESTION)
    assert "Paris" in result.output


@check
async def stream() -> None:
    """run_stream"""
    async with Agent(chat_model).run_stream(QUESTION) as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 1 and "Paris" in "".join(pieces)


@check
def native() -> None:
    """a schema as response_format"""
    result = Agent(chat_model, output_type=NativeOutput(City)).run_sync(QUESTION)
    assert isinstance(result.output, City)


@check
def by_tool() -> None:
    """a schema as a required tool"""
    result = Agent(chat_model, output_type=ToolOutput(City)).run_sync(QUESTION)
    assert isinstance(result.output, City)


if __name__ == "__main__":
    run()
