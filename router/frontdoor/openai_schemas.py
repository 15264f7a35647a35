"""Bodies of the OpenAI HTTP API: what is read of them. `openai_fields` has what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from crossdock.proto.convert import SAMPLING_SCALARS
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from crossdock.router.frontdoor import openai_fields
from crossdock.router.frontdoor.json_body import parse_object, to_struct
from crossdock.router.frontdoor.structured import StructuredFields
from crossdock.router.frontdoor.validate import UNLIMITED

DEFAULT_COMPLETION_TOKENS = 16

Body = TypeVar("Body", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct):
    """The body's `stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: each event tells the usage so far


class SamplingFields(StructuredFields, kw_only=True):
    """What /v1/completions and /v1/chat/completions have in common. None is "not given"."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    @property
    def made(self) -> int | None:
        """Continuations of which the best are answered, where that is asked for."""
        return None


class CompletionBody(SamplingFields, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def made(self) -> int | None:
        return self.best_of

    @property
    def echo_logprobs(self) -> int | None:
        """Alternatives of the echoed prompt's tokens; None: not asked for."""
        return self.logprobs if self.echo else None


class ContentPart(msgspec.Struct):
    """One part of a message whose content is a list."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None


class ChatBody(SamplingFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ResponseBody(SamplingFields, kw_only=True):
    """The body of POST /v1/responses, with what completions know beside it."""

    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: Any = None
    reasoning: Any = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    max_tool_calls: int | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """The body of POST /tokenize: a prompt as it is, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def read_body(body: bytes, kind: type[Body], strict: bool = False) -> Body:
    """The typed body. Raises InvalidRequest naming the first field that is not as it must be; where
    `strict`, that is also one that is not known."""
    return read_fields(parse_object(body), kind, strict)


def read_fields(raw: dict[str, Any], kind: type[Body], strict: bool = False) -> Body:
    """The same of a body that is parsed already."""
    openai_fields.check_fields(raw, kind.__struct_fields__, strict)
    openai_fields.check_stream(raw, StreamOptions.__struct_fields__, strict)
    parts = ContentPart.__struct_fields__
    openai_fields.check_messages(raw, Message.__struct_fields__, parts, strict)
    return to_struct(raw, kind)


def sampling_of(body: SamplingFields, seed: int) -> SamplingParams:
    """Sampling parameters with defaults in place of what was not given. Checks only the shape."""
    given = {
        name: value
        for name in SAMPLING_SCALARS
        if name not in ("seed", "max_tokens", "logprobs", "prompt_logprobs")
        and (value := getattr(body, name)) is not None
    }
    return SamplingParams(
        **given,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=seed if body.seed is None else body.seed,
        ignore_eos=bool(body.ignore_eos),
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
        prompt_logprobs=_prompt_logprobs(body),
    )


def prompts_of(prompt: Any) -> list[str | list[int] | np.ndarray]:
    """One prompt or several, each a text or token ids; numpy's of a large body."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt is None:
        raise InvalidRequest("prompt", None, "is required")
    limit = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    if not isinstance(prompt, list):
        raise InvalidRequest("prompt", prompt, limit)
    if not prompt:
        raise InvalidRequest("prompt", prompt, "must not be empty")
    if set(map(type, prompt)) == {int}:
        return [prompt]
    flat = _is_token(prompt[0])
    for i, item in enumerate(prompt):
        if not (_is_token(item) if flat else isinstance(item, str) or _are_tokens(item)):
            raise InvalidRequest(f"prompt[{i}]", item, limit)
    return [prompt] if flat else prompt


def _are_tokens(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, list) and all(map(_is_token, value)))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIAS:
        limit = f"at most {MAX_LOGIT_BIAS} entries"
        raise InvalidRequest("logit_bias", f"{len(given)} entries", limit)
    found = {}
    for key, bias in given.items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise InvalidRequest("logit_bias", key, "keys must be token ids")
        found[int(key)] = bias
    return found


def _max_tokens(body: SamplingFields) -> int:
    given = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        given = body.max_completion_tokens
        if given < 1:
            raise InvalidRequest("max_completion_tokens", given, "must be at least 1")
    return UNLIMITED if given is None else given


def _prompt_logprobs(body: SamplingFields) -> int | None:
    if body.prompt_logprobs is not None and body.stream:
        limit = "cannot be had in a stream; echo with logprobs can"
        raise InvalidRequest("prompt_logprobs", body.prompt_logprobs, limit)
    echoed = body.echo_logprobs if isinstance(body, CompletionBody) else None
    asked = [each for each in (body.prompt_logprobs, echoed) if each is not None]
    return max(asked, default=None)


def _logprobs(body: SamplingFields) -> int | None:
    if isinstance(body, ChatBody):
        if not body.logprobs:
            if body.top_logprobs:
                raise InvalidRequest("top_logprobs", body.top_logprobs, "needs logprobs to be true")
            return None
        asked = body.top_logprobs or 0
        if not 0 <= asked <= MAX_LOGPROBS:
            raise InvalidRequest("top_logprobs", asked, f"must be from 0 to {MAX_LOGPROBS}")
        return asked
    return body.logprobs if isinstance(body, CompletionBody) else None
