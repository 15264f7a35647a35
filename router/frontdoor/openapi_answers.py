"""What the HTTP front door answers, as /openapi.json tells it. Tests hold the answers to it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class Error(msgspec.Struct):
    """What went wrong. `param` is the field that is not as it must be, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct):
    """Of every request that is refused or fails."""

    error: Error


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt, what was found in a prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens, each prompt counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(msgspec.Struct):
    """A token with the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that was drawn, and the most probable ones at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """Of a chat's choice."""

    content: list[ChosenLogprob]


class CalledFunction(msgspec.Struct):
    """A tool's name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(msgspec.Struct):
    """What the model says, and which tools it calls where it does."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class PromptLogprob(msgspec.Struct):
    """A token at a place of the prompt. `rank`: among all tokens, 1 the most probable."""

    logprob: float
    rank: int
    decoded_token: str


# By token of the prompt, null for the first: by token id, that of the prompt and the best.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class ChatCompletion(msgspec.Struct):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct):
    """Of a completion's choice; an entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct):
    """The answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ResponseInputDetails(msgspec.Struct):
    """Of the input, what was found in a prefix cache, and what had to be paid to be kept in one:
    nothing."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseOutputDetails(msgspec.Struct):
    """Of the output, what is thought and not shown: nothing."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    """Tokens of one turn; the input has those of the turns before it."""

    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ResponseOutputDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class Response(msgspec.Struct):
    """The answer of POST /v1/responses, and what is kept of it. Beside these it repeats its
    request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    store: bool
    previous_response_id: str | None


class ResponseItems(msgspec.Struct):
    """The answer of GET /v1/responses/{id}/input_items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(msgspec.Struct):
    """The answer of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"]
    deleted: bool


class Model(msgspec.Struct):
    """A model that is served, or a route to some, which has neither context nor aliases."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int | UnsetType = UNSET
    aliases: list[str] | UnsetType = UNSET


class Models(msgspec.Struct):
    """The answer of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(msgspec.Struct):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(msgspec.Struct):
    """The answer of POST /detokenize."""

    prompt: str


class Health(msgspec.Struct):
    """The answer of GET /health and /ping."""

    status: str


class Version(msgspec.Struct):
    """The answer of GET /version."""

    version: str


ANSWERS: tuple[Any, ...] = (
    ErrorAnswer, ChatCompletion, Completion, Response, ResponseItems, ResponseDeleted, Model,
    Models, Tokens, Text, Health, Version,
)  # fmt: skip
