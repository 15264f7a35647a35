"""Bodies of the OpenAI HTTP API: what is read of them, and what is refused by name.

Fields that are not named here are ignored, as clients send many; a field that would change the
answer and is not supported is refused when it asks for anything but its default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from crossdock.proto.convert import SAMPLING_SCALARS
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import SamplingParams
from crossdock.router.frontdoor.structured import StructuredFields
from crossdock.router.frontdoor.validate import UNLIMITED

DEFAULT_COMPLETION_TOKENS = 16

Body = TypeVar("Body", bound="SamplingFields")


class StreamOptions(msgspec.Struct):
    """The body's `stream_options`."""

    include_usage: bool | None = None


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
    priority: int | None = None
    cache_salt: str | None = None


class CompletionBody(SamplingFields, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None


class ContentPart(msgspec.Struct):
    """One part of a message whose content is a list."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(SamplingFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


# Field -> whether a value leaves the answer as it would be without the field.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "tools": lambda value: not value,
    "tool_choice": lambda value: value in (None, "none", "auto"),
    "functions": lambda value: not value,
    "function_call": lambda value: value in (None, "none", "auto"),
    "modalities": lambda value: value in (None, ["text"]),
    "audio": lambda value: value is None,
    "prediction": lambda value: value is None,
    "web_search_options": lambda value: value is None,
    "suffix": lambda value: not value,
    "best_of": lambda value: value is None,
}


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. NaN and Infinity are read, to be refused under their field."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{body[error.start]:02x} at offset {error.start}"
        raise InvalidRequest("body", bad, "must be UTF-8") from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise InvalidRequest("body", where, "must be valid JSON") from None
    except (RecursionError, ValueError) as error:
        raise InvalidRequest("body", str(error), "must be plain JSON") from None
    if not isinstance(found, dict):
        raise InvalidRequest("body", type(found).__name__, "must be a JSON object")
    return found


def read_body(body: bytes, kind: type[Body]) -> Body:
    """The typed body. Raises InvalidRequest naming the first field that is not as it must be."""
    raw = parse_json(body)
    for field, harmless in _HARMLESS.items():
        if field in raw and not harmless(raw[field]):
            if field == "best_of" and raw[field] == (raw.get("n") or 1):
                continue
            raise InvalidRequest(field, raw[field], "is not supported by this server")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _field_error(raw, str(error)) from None


def sampling_of(body: SamplingFields, seed: int) -> SamplingParams:
    """Sampling parameters with defaults in place of what was not given. Checks only the shape."""
    given = {
        name: value
        for name in SAMPLING_SCALARS
        if name not in ("seed", "max_tokens", "logprobs")
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
    )


def messages_of(body: ChatBody) -> list[dict[str, str]]:
    """Messages with their text parts joined."""
    plain = []
    for i, message in enumerate(body.messages):
        content = message.content
        if isinstance(content, list):
            for j, part in enumerate(content):
                if part.type != "text":
                    field = f"messages[{i}].content[{j}].type"
                    raise InvalidRequest(field, part.type, 'only "text" parts are supported')
            content = "".join(part.text or "" for part in content)
        plain.append({"role": message.role, "content": content or ""})
    return plain


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt is None:
        raise InvalidRequest("prompt", None, "is required")
    limit = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    if not isinstance(prompt, list):
        raise InvalidRequest("prompt", prompt, limit)
    if not prompt:
        raise InvalidRequest("prompt", prompt, "must not be empty")
    if all(_is_token(item) for item in prompt):
        return [prompt]
    for i, item in enumerate(prompt):
        tokens = isinstance(item, list) and all(_is_token(token) for token in item)
        if not tokens and not isinstance(item, str):
            raise InvalidRequest(f"prompt[{i}]", item, limit)
    return prompt


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
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
    return UNLIMITED if given is None else given


def _logprobs(body: SamplingFields) -> int | None:
    if isinstance(body, ChatBody):
        if not body.logprobs:
            if body.top_logprobs:
                raise InvalidRequest("top_logprobs", body.top_logprobs, "needs logprobs to be true")
            return None
        return body.top_logprobs or 0
    return body.logprobs if isinstance(body, CompletionBody) else None


def _field_error(raw: dict[str, Any], message: str) -> InvalidRequest:
    """A schema error, with its value looked up along the path that it names."""
    limit, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if missing := re.match(r"Object missing required field `(\w+)`", limit):
        field = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(field, None, "is required")
    value: Any = raw
    for key in re.findall(r"[^.\[\]]+", path):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            break
    return InvalidRequest(path or "body", value, limit[:1].lower() + limit[1:])
