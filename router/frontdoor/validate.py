"""What a request may hold. Every error names field, value and limit, before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crossdock.model.text import TextModel
from crossdock.proto.errors import ContextLengthExceeded, InvalidRequest
from crossdock.proto.types import LEAST_MAX_TOKENS, MAX_N, SamplingParams
from crossdock.router.frontdoor.json_body import check_unicode

MAX_PROMPTS = 64
MAX_MESSAGES = 2048
MAX_LABEL_CHARACTERS = 256
LEAST_PRIORITY, MOST_PRIORITY = -(2**31), 2**31 - 1
ROLES = ("system", "developer", "user", "assistant", "tool")  # of messages
UNLIMITED = 2**62  # max_tokens of a request that leaves it open, until its prompt is known


@dataclass(frozen=True)
class Validator:
    """Checks against the model, and against the workers' KV pools as they are now."""

    model_id: str
    text: TextModel
    longest_token: int  # characters; bounds from below how many tokens a text has
    pool_tokens: Callable[[], int | None]

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have, prompt and completion together."""
        pool = self.pool_tokens()
        context = self.text.context_length
        return context if pool is None else min(context, pool)

    def check_text(self, field: str, text: str) -> None:
        """Before tokenization, so that what cannot fit costs nothing."""
        if not text:
            raise InvalidRequest(field, text, "must not be empty")
        if len(text) > self.capacity * self.longest_token:
            limit = f"at most {self.capacity - 1} tokens, as {self._capacity_reason()}"
            raise ContextLengthExceeded(field, f"{len(text)} characters", limit)
        check_unicode(field, text)

    def check_prompt(self, field: str, token_ids: Sequence[int] | np.ndarray) -> None:
        """Raises InvalidRequest for a prompt that is empty, out of the vocabulary or too long."""
        self.check_length(field, len(token_ids))
        wrong = _first_outside(token_ids, self.text.vocab_size)
        if wrong is not None:
            limit = f"token ids must be from 0 to {self.text.vocab_size - 1}"
            raise InvalidRequest(field, wrong, limit)

    def check_length(self, field: str, tokens: int) -> None:
        """Raises InvalidRequest for a prompt of so many tokens that is empty or too long."""
        if not tokens:
            raise InvalidRequest(field, [], "must not be empty")
        if tokens >= self.capacity:
            raise ContextLengthExceeded(
                field,
                f"{tokens} tokens",
                f"at most {self.capacity - 1} tokens before the first one generated, as "
                f"{self._capacity_reason()}",
            )

    def check_request(self, n: int, sampling: SamplingParams, echo: bool = False) -> None:
        """What can be known before the prompt is tokenized. `echo`: it is part of the answer.
        Raises InvalidRequest."""
        if not 1 <= n <= MAX_N:
            raise InvalidRequest("n", n, f"must be from 1 to {MAX_N}")
        sampling.validate(self.text.vocab_size)
        if not (sampling.max_tokens or echo or sampling.prompt_logprobs is not None):
            raise InvalidRequest("max_tokens", 0, LEAST_MAX_TOKENS)
        for text in sampling.stop:
            check_unicode("stop", text)
        if sampling.max_tokens != UNLIMITED and sampling.max_tokens >= self.capacity:
            raise ContextLengthExceeded(
                "max_tokens",
                sampling.max_tokens,
                f"must be less than {self.capacity}, as {self._capacity_reason()}",
            )

    def fit(
        self, sampling: SamplingParams, prompt_tokens: int, default_max_tokens: int
    ) -> SamplingParams:
        """With max_tokens filled in where it was left open: the default, or what fits of it.
        Raises where what was asked for does not fit."""
        room = self.capacity - prompt_tokens
        if sampling.max_tokens == UNLIMITED:
            if sampling.min_tokens > room:
                limit = f"at most {room} tokens fit after a prompt of {prompt_tokens}"
                raise ContextLengthExceeded("min_tokens", sampling.min_tokens, limit)
            default = max(sampling.min_tokens, min(room, default_max_tokens))
            return replace(sampling, max_tokens=default)
        if sampling.max_tokens > room:
            raise ContextLengthExceeded(
                "max_tokens",
                sampling.max_tokens,
                f"at most {room} tokens fit after a prompt of {prompt_tokens}, as "
                f"{self._capacity_reason()}",
            )
        return sampling

    def _capacity_reason(self) -> str:
        pool = self.pool_tokens()
        if pool is not None and pool < self.text.context_length:
            return f"a worker holds at most {pool} tokens of a sequence"
        return f"this model's maximum context length is {self.text.context_length} tokens"


def check_prompts(field: str, count: int) -> None:
    """Raises InvalidRequest for none or too many prompts."""
    if not 1 <= count <= MAX_PROMPTS:
        raise InvalidRequest(field, f"{count} prompts", f"must be from 1 to {MAX_PROMPTS}")


def _first_outside(token_ids: Sequence[int] | np.ndarray, vocab_size: int) -> int | None:
    """The first id that is none of the vocabulary's."""
    if isinstance(token_ids, list) and 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        return None
    try:
        ids = np.asarray(token_ids, dtype=np.int64)
    except OverflowError:
        return next(i for i in token_ids if not 0 <= i < vocab_size)
    outside = (ids < 0) | (ids >= vocab_size)
    return int(ids[outside.argmax()]) if outside.any() else None


def check_label(field: str, value: str) -> None:
    """Short names that clients choose: request ids, tenants, salts."""
    if len(value) > MAX_LABEL_CHARACTERS:
        limit = f"at most {MAX_LABEL_CHARACTERS} characters"
        raise InvalidRequest(field, f"{len(value)} characters", limit)
    check_unicode(field, value)


def check_count_of_messages(field: str, count: int) -> None:
    """Before they are looked at. Raises InvalidRequest for too many messages."""
    if count > MAX_MESSAGES:
        raise InvalidRequest(field, f"{count} messages", f"at most {MAX_MESSAGES} messages")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises InvalidRequest for a conversation that no template takes."""
    if not messages:
        raise InvalidRequest("messages", [], "must hold at least one message")
    check_count_of_messages("messages", len(messages))
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            limit = f"must be {', '.join(ROLES[:-1])} or {ROLES[-1]}"
            raise InvalidRequest(f"messages[{i}].role", role, limit)
        check_unicode(f"messages[{i}].content", message["content"])
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        raise InvalidRequest("messages", "only empty contents", "must not be empty")
