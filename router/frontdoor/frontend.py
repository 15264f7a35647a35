"""The way from a parsed body to a request under way, shared by gRPC and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from crossdock.model.text import TextModel
from crossdock.proto.errors import CrossdockError, InvalidRequest
from crossdock.proto.types import Grammar, SamplingParams
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.request import Request, ResponseStream
from crossdock.router.frontdoor.gate import Gate, Visit
from crossdock.router.frontdoor.grammar_check import GrammarChecker
from crossdock.router.frontdoor.limits import Work
from crossdock.router.frontdoor.text_process import INLINE_CHARACTERS, TextProcess, listed
from crossdock.router.frontdoor.tokenized import Tokenized
from crossdock.router.frontdoor.tools.conversation import Conversation
from crossdock.router.frontdoor.tools.formats import ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.validate import (
    LEAST_PRIORITY,
    MOST_PRIORITY,
    UNLIMITED,
    Validator,
    check_label,
    check_messages,
)

NO_OFFER = Offer()
SLICE_TOKENS = 32_768  # hashed without letting others run
MAX_SCORED_ENTRIES = 4_000_000  # log-probabilities of one request's prompts, some 60 bytes each
INLINE_TOKENS = 1024  # a longer prompt lets others run in between


@dataclass(frozen=True)
class Arrival:
    """When and how a request came in, noted before anything is done with it."""

    received: float
    received_unix: float
    trace_context: Any
    deadline: float  # on the gateway's clock
    visit: Visit  # by whom


@dataclass(frozen=True)
class Prepared:
    """A request's prompts as one model's tokenizer has them, `n` answers each, and how they are to
    be answered."""

    field: str  # that the prompts came in
    prompts: Sequence[Sequence[int] | np.ndarray]
    sampling: SamplingParams
    n: int
    offer: Offer = NO_OFFER

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))


@dataclass(frozen=True)
class Frontend:
    """Tokenizes, validates and submits for one model."""

    text: TextModel
    validator: Validator
    dispatcher: Dispatcher
    aside: TextProcess  # for what would hold the loop
    timeout_s: float  # of a request that brings no deadline
    gate: Gate
    grammars: GrammarChecker
    tool_format: ToolFormat
    aliases: tuple[str, ...] = ()  # other names that clients may use
    tokenized: Tokenized | None = None  # where other models are asked about the same request
    party: str = ""  # who takes turns with others, where that is one

    @property
    def model_id(self) -> str:
        """The name that clients use."""
        return self.validator.model_id

    def known_as(self, aliases: tuple[str, ...], tool_format: ToolFormat) -> Frontend:
        """The same model under these names besides its own, writing calls of tools like this."""
        return replace(self, aliases=aliases, tool_format=tool_format)

    def asked_by(self, party: str, tokenized: Tokenized | None = None) -> Frontend:
        """The same model for a request of this party; `tokenized` where it is one of several that
        may serve it."""
        return replace(self, party=party, tokenized=tokenized)

    def arrival(
        self, visit: Visit, trace_context: Any = None, timeout_s: float | None = None
    ) -> Arrival:
        """A request that came now by who was let in, with its deadline."""
        now = time.monotonic()
        allowed = self.timeout_s if timeout_s is None else timeout_s
        return Arrival(now, time.time(), trace_context, now + allowed, visit)

    @contextlib.contextmanager
    def refusals_counted(self, arrival: Arrival) -> Iterator[None]:
        """Around what may refuse a request before the dispatcher has it."""
        try:
            yield
        except CrossdockError as error:
            self.dispatcher.metrics.outcome(error)
            self.gate.refused(arrival.visit, error)
            raise
        except BaseException as error:
            self.gate.refused(arrival.visit, error)
            raise

    def draw_seed(self) -> int:
        """For a request that brings none: from here on it is as repeatable as one that does."""
        return random.getrandbits(63)

    async def encode(self, field: str, text: str) -> list[int]:
        """Token ids of a prompt. Raises InvalidRequest."""
        self.validator.check_text(field, text)
        return await self._ids("encode", len(text), text)

    async def starts(self, text: str, token_ids: Sequence[int]) -> list[int]:
        """See TextModel.starts."""
        return await self.aside.call(self.party, "starts", text, token_ids)

    async def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of a prompt. Others run after a long one."""
        text = self.text.decode(token_ids)
        if len(token_ids) > INLINE_TOKENS:
            await asyncio.sleep(0)
        return text

    async def encode_chat(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation, through the model's chat template."""
        arguments = conversation.rendered(self.text, self.tool_format)
        plain = arguments[0]
        size = self._checked_size(conversation, *arguments)
        try:
            return await self._ids("apply_chat_template", size, *arguments)
        except CrossdockError:
            raise
        except Exception as error:  # a template is a program of the model's makers
            refusal = f"the model's chat template refused them: {error}"
            raise InvalidRequest("messages", f"{len(plain)} messages", refusal) from error

    async def encode_next(
        self, history: Sequence[int], conversation: Conversation, after: int
    ) -> list[int]:
        """Token ids of a conversation whose last `after` messages follow one that stands for an
        answer; `history` are the ids of its prompt and of the answer as it was drawn. Empty where
        the model's chat template does not simply go on from there."""
        rendered = conversation.rendered(self.text, self.tool_format)
        messages, _, more = rendered
        size = self._checked_size(conversation, *rendered)
        split = len(messages) - after
        arguments = messages[: split - 1], messages[split:], more
        ids = await self._ids("next_turn", size, *arguments)
        if history and history[-1] in self.text.eos_token_ids:
            history = history[:-1]  # the template writes the end of a turn itself
        return [*history, *ids] if ids else []

    async def _ids(self, method: str, size: int, *arguments: Any) -> list[int]:
        """What this method of the text model makes of so many characters."""

        async def make() -> list[int]:
            if size > INLINE_CHARACTERS:
                return await self.aside.call(self.party, method, *arguments)
            found: list[int] = getattr(self.text, method)(*arguments)
            return found

        if self.tokenized is None:
            return await make()
        template, about = self.text.template, arguments
        if method != "encode":  # of the request's one conversation, as this model's template has it
            about = (template and template.identity, self.tool_format.name)
        return await self.tokenized.once((method, self.text.pieces.digest, *about), make)

    def _checked_size(
        self, conversation: Conversation, plain: Sequence[Mapping[str, Any]], _: Any, more: Any
    ) -> int:
        """Characters of a rendered conversation. Raises InvalidRequest where they are too many."""
        check_messages(conversation.messages)
        size = sum(map(_size, plain)) + _size(more)
        if size > self.validator.capacity * self.validator.longest_token:
            self.validator.check_text("messages", "".join(str(m["content"]) for m in plain))
        return size

    async def with_grammar(
        self, arrival: Arrival, sampling: SamplingParams, field: str, grammar: Grammar
    ) -> SamplingParams:
        """With what the answer must match. Raises InvalidRequest, naming `field`, where it cannot
        be used."""
        sampling = replace(sampling, grammar=grammar)
        sampling.validate(self.text.vocab_size)
        await self.grammars.check(field, grammar, arrival.visit.principal.party)
        return sampling

    async def submit(
        self,
        prepared: Prepared,
        arrival: Arrival,
        *,
        request_id: str,
        tenant: str,
        priority: int,
        cache_salt: str,
        default_max_tokens: int = UNLIMITED,
    ) -> tuple[str, ResponseStream]:
        """Request id and stream. `tenant` and `priority` are what the client says, held to
        its credential. Raises InvalidRequest naming the prompts' field for a bad one."""
        visit, field, sampling = arrival.visit, prepared.field, prepared.sampling
        prompts, offer, n = prepared.prompts, prepared.offer, prepared.n
        with self.refusals_counted(arrival):
            check_label("request_id", request_id)
            check_label("tenant", tenant)
            check_label("cache_salt", cache_salt)
            if not LEAST_PRIORITY <= priority <= MOST_PRIORITY:
                limit = f"must be from {LEAST_PRIORITY} to {MOST_PRIORITY}"
                raise InvalidRequest("priority", priority, limit)
            lists: list[list[int]] = []
            for i, prompt in enumerate(prompts):
                self.validator.check_prompt(field if len(prompts) == 1 else f"{field}[{i}]", prompt)
                lists.append(await listed(prompt))
            longest = max(map(len, lists))
            if sampling.prompt_logprobs is not None:
                entries = sum(map(len, lists)) * (1 + sampling.prompt_logprobs)
                if entries > MAX_SCORED_ENTRIES:
                    raise InvalidRequest(
                        "prompt_logprobs",
                        sampling.prompt_logprobs,
                        f"{entries} entries are to be told, of at most {MAX_SCORED_ENTRIES}",
                    )
            principal = visit.principal = visit.principal.named(tenant)
            principal.check_model([self.model_id])
            room = principal.room(field, sampling, longest)
            fitted = self.validator.fit(sampling, longest, min(default_max_tokens, room))
            request = Request(
                request_id=request_id or uuid.uuid4().hex,
                prompts=lists,
                sampling=fitted,
                n=n,
                tenant=principal.party,
                priority=principal.priority(priority),
                # Tenants never share cached prefixes with each other, nor do unlike salts.
                cache_salt=(salt := principal.cache_salt(cache_salt)),
                root_hash=self.dispatcher.root_hash(salt),
                received=arrival.received,
                received_unix=arrival.received_unix,
                deadline=arrival.deadline,
                trace_context=arrival.trace_context,
                model=self.model_id,
                asked_model=visit.asked_model,
                route=visit.route,
                response=visit.response,
                answered_by=visit.answered_by,
                on_end=partial(self.gate.ended, visit),
                shown=self.text.ids_of(self.tool_format.markers) if offer.tools else frozenset(),
            )
            visit.request = request
            work = Work(
                prompt_tokens=sum(len(prompt) for prompt in prompts),
                sequences=request.num_sequences,
                max_tokens=fitted.max_tokens,
                open_ended=sampling.max_tokens == UNLIMITED,
            )
            self.gate.admit(visit, work)
        try:
            for prompt in request.prompts:
                request.chains.append(await self._chain(prompt, request.root_hash))
            return request.request_id, self.dispatcher.submit(request)
        except BaseException as error:
            self.gate.refused(visit, error)
            raise

    async def _chain(self, prompt: Sequence[int], root: bytes) -> list[bytes]:
        """The hashes of its blocks, computed in slices."""
        hashes: list[bytes] = []
        for end in range(SLICE_TOKENS, len(prompt) + SLICE_TOKENS, SLICE_TOKENS):
            self.dispatcher.hasher.extend(hashes, prompt[:end], root)
            if len(prompt) > INLINE_TOKENS:
                await asyncio.sleep(0)
        return hashes


def _size(value: Any) -> int:
    """Characters of all the texts in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value)) + sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
