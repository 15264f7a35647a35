"""instructor: answers of a pydantic class, in three of its modes."""

from __future__ import annotations

import instructor
import openai
from checking import MODEL, QUESTION, check, run
from pydantic import BaseModel, ConfigDict, Field


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=100_000_000)


def ask(mode: instructor.Mode) -> City:
    client = instructor.from_openai(openai.OpenAI(), mode=mode)
    return client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_model=City, temperature=0, max_tokens=100
    )


@check
def json_schema() -> None:
    """JSON_SCHEMA"""
    assert isinstance(ask(instructor.Mode.JSON_SCHEMA), City)


@check
def tools() -> None:
    """TOOLS"""
    assert isinstance(ask(instructor.Mode.TOOLS), City)


@check
def strict_tools() -> None:
    """TOOLS_STRICT"""
    assert isinstance(ask(instructor.Mode.TOOLS_STRICT), City)


@check
def partial() -> None:
    """create_partial, streamed"""
    client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
    seen = list(
        client.chat.completions.create_partial(
            model=MODEL, messages=QUESTION, response_model=City, temperature=0, max_tokens=100
        )
    )
    assert len(seen) > 1 and seen[-1].name and seen[-1].people is not None


if __name__ == "__main__":
    run()
