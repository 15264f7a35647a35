"""/v1/responses: a chat whose history the cluster keeps.

A turn is the previous response's conversation and the new input, answered by the same path as a
chat. Its prompt is, where the model's template allows it, the very tokens of the turn before and
what the template adds: so all of its KV that is cached is found, whatever tokens a text would be
made of if it were tokenized again.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec
from aiohttp import web

from crossdock.proto.errors import InvalidRequest, show
from crossdock.router.frontdoor.frontend import Arrival, Frontend
from crossdock.router.frontdoor.http_access import TENANT_HEADER, visit_of
from crossdock.router.frontdoor.http_errors import ResponseNotFound
from crossdock.router.frontdoor.openai_format import Answer
from crossdock.router.frontdoor.openai_schemas import ChatBody, ResponseBody
from crossdock.router.frontdoor.responses_format import ResponseAnswer
from crossdock.router.frontdoor.responses_input import (
    Item,
    chat_of,
    choice_of,
    form_of,
    items_of,
    messages_of,
    system_of,
)
from crossdock.router.frontdoor.responses_store import Kept, ResponseStore
from crossdock.router.frontdoor.structured import dump
from crossdock.router.frontdoor.tools.chat import conversation_of, tools_of
from crossdock.router.frontdoor.tools.conversation import Conversation
from crossdock.router.frontdoor.tools.formats import ToolFormat
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.validate import UNLIMITED, check_label

MAX_LISTED = 100
_RENAMED = (  # what the chat calls them
    (r"^messages(\[\d+\])?", "input"),
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"^(max_completion_tokens|max_tokens)$", "max_output_tokens"),
    (r"^(tools\[\d+\]|tool_choice)\.function", r"\1"),
)
_ANSWER = {"role": "assistant", "content": ""}

Serve = Callable[..., Awaitable[web.StreamResponse]]


class ReadBody(Protocol):
    """Reads a request's body as a struct."""

    async def __call__(self, request: web.Request, arrival: Arrival, kind: Any) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """A turn as one model takes it."""

    token_ids: Sequence[int]
    context: bytes  # what it was rendered from beside the items, hashed
    how: ToolFormat


@dataclass
class Turn:
    """One turn of a conversation, from its body to what is kept of it."""

    tenant: str
    body: ResponseBody
    previous: Kept | None
    items: list[Item]  # of the conversation, this turn's input at the end
    first: int  # where that begins
    chat: ChatBody
    offer: Offer
    prompts: dict[str, Prompt] = field(default_factory=dict)  # by model, of those that were tried

    async def read(self, frontend: Frontend) -> list[int]:
        """The prompt's token ids. Raises InvalidRequest."""
        conversation = conversation_of(self.chat, self.offer)
        context = _context(self.body, conversation, frontend)
        ids = await self._gone_on(frontend, conversation, context)
        ids = ids or await frontend.encode_chat(conversation)
        self.prompts[frontend.model_id] = Prompt(ids, context, frontend.tool_format)
        return ids

    async def _gone_on(
        self, frontend: Frontend, conversation: Conversation, context: bytes
    ) -> list[int]:
        """Empty where the previous turn's tokens cannot be gone on from."""
        kept = self.previous
        if kept is None or kept.context != context:
            return []
        system, messages = len(system_of(self.body)), conversation.messages
        before = system + len(messages_of(self.items[: kept.answered]))
        known = system + len(messages_of(self.items[: self.first]))
        after = len(messages_of(self.items[self.first :]))
        if not after or known + after != len(messages):  # the input goes on with a message
            return []
        shown = [*messages[:before], _ANSWER, *messages[len(messages) - after :]]
        return await frontend.encode_next(kept.tokens, replace(conversation, messages=shown), after)

    def about(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        body = self.body
        return {
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": self.chat.reasoning_effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": form_of(body.text), "verbosity": "medium"},
            "tool_choice": choice_of(body.tool_choice),
            "tools": [{"parameters": None, "strict": None} | tool for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def kept(self, answer: ResponseAnswer) -> Kept:
        """What the next turn needs."""
        prompt = self.prompts[answer.model]
        ids = array("I", prompt.token_ids)
        ids.extend(answer.token_ids)
        return Kept(
            response=msgspec.json.encode(answer.response(answer.status)),
            items=self.items + answer.output,
            first=self.first,
            answered=len(self.items),
            token_ids=ids.tobytes(),
            context=prompt.context if answer.shows_all else b"",  # else it is rendered anew
            answered_by=answer.answered_by,
        )


class ResponsesDoor:
    """The routes under /v1/responses. `serve` answers a request for tokens, as for a chat."""

    def __init__(self, store: ResponseStore, read: ReadBody, serve: Serve) -> None:
        self._store, self._read, self._serve = store, read, serve

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """All of them."""
        router.add_post("/v1/responses", self._create)
        router.add_get("/v1/responses/{id}", self._get)
        router.add_delete("/v1/responses/{id}", self._delete)
        router.add_get("/v1/responses/{id}/input_items", self._input_items)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        turns: list[Turn] = []

        async def read(arrival: Arrival) -> ChatBody:
            body: ResponseBody = await self._read(request, arrival, ResponseBody)
            turns.append(await self._turn(request, body))
            arrival.visit.response = self._store.new_id(turns[0].tenant)
            if (last := turns[0].previous) is not None:
                arrival.visit.answered_by = last.answered_by
            return turns[0].chat

        async def read_prompts(frontend: Frontend, chat: ChatBody) -> tuple[str, list[list[int]]]:
            return "input", [await turns[0].read(frontend)]

        def answer(*shared: Any, model: str, **more: Any) -> Answer:
            turn = turns[0]
            answer_id = visit_of(request).response

            async def keep(answer: ResponseAnswer) -> bool:
                return await self._store.put(turn.tenant, answer.id, turn.kept(answer))

            own: dict[str, Any] = {
                "offer": turn.offer,
                "model": model,
                "how": turn.prompts[model].how,
                "about": turn.about(),
                "id": answer_id,
                "keep": keep,
                "stored": turn.body.store is not False,
            }
            return ResponseAnswer(*shared, **more | own)

        try:
            return await self._serve(request, read, read_prompts, UNLIMITED, answer)
        except InvalidRequest as error:
            if turns and error.field == "max_tokens" and turns[0].body.max_tokens is not None:
                raise  # by its own name
            raise _renamed(error) from None

    async def _turn(self, request: web.Request, body: ResponseBody) -> Turn:
        tenant, previous = _tenant(request), None
        new, items = items_of(body.input), list[Item]()
        if body.previous_response_id is not None:
            field = "previous_response_id"
            previous = await self._kept(tenant, body.previous_response_id, field)
            items = previous.items
        if not new and not items:
            raise InvalidRequest("input", body.input, "must not be empty")
        chat = chat_of(body, items + new)
        return Turn(tenant, body, previous, items + new, len(items), chat, tools_of(chat))

    async def _kept(self, tenant: str, id_: str, field: str | None = None) -> Kept:
        """Raises ResponseNotFound or Unavailable."""
        kept = await self._store.get(tenant, id_)
        if kept is None:
            what = f"{field}: " if field else ""
            raise ResponseNotFound(
                f"{what}{show(id_)} is not kept here: too old, not stored, deleted, or "
                "the workers that kept it are gone; send the whole conversation as input",
                field,
            )
        return kept

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("stream", "false") != "false":
            raise InvalidRequest("stream", request.query["stream"], "is not supported here")
        kept = await self._kept(_tenant(request), request.match_info["id"])
        return web.Response(body=kept.response, content_type="application/json")

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        id_ = request.match_info["id"]
        if not await self._store.drop(_tenant(request), id_):
            raise ResponseNotFound(f"{show(id_)} is not kept here")
        return web.json_response({"id": id_, "object": "response", "deleted": True})

    async def _input_items(self, request: web.Request) -> web.StreamResponse:
        """What the response's own request brought, the newest first unless `order` is asc."""
        query = request.query
        kept = await self._kept(_tenant(request), request.match_info["id"])
        items = kept.items[kept.first : kept.answered]
        if _one_of("order", query.get("order", "desc"), ("asc", "desc")) == "desc":
            items = items[::-1]
        if after := query.get("after"):
            ids = [item["id"] for item in items]
            if after not in ids:
                raise InvalidRequest("after", after, "must be the id of one of the items")
            items = items[ids.index(after) + 1 :]
        limit = query.get("limit", "20")
        if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= MAX_LISTED:
            raise InvalidRequest("limit", limit, f"must be from 1 to {MAX_LISTED}")
        shown = items[: int(limit)]
        return web.json_response(
            {
                "object": "list",
                "data": shown,
                "first_id": shown[0]["id"] if shown else None,
                "last_id": shown[-1]["id"] if shown else None,
                "has_more": len(items) > len(shown),
            }
        )


def _tenant(request: web.Request) -> str:
    """Whose responses these are. Raises Forbidden or InvalidRequest."""
    named = request.headers.get(TENANT_HEADER, "")
    check_label("tenant", named)
    return visit_of(request).principal.named(named).tenant


def _one_of(field: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise InvalidRequest(field, value, f"must be {' or '.join(allowed)}")
    return value


def _context(body: ResponseBody, conversation: Conversation, frontend: Frontend) -> bytes:
    """What a prompt is rendered from beside its items, hashed: a turn under another is rendered
    anew."""
    tools = [tool.given for tool in conversation.offer.tools]
    weights = frontend.dispatcher.view.weights_digest  # another model may get the name
    told = [frontend.model_id, weights, tools, dict(conversation.options)]
    hashed = hashlib.sha256(dump("tools", told).encode())
    hashed.update(b"" if body.instructions is None else b"\0" + body.instructions.encode())
    return hashed.digest()


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """The same with the field that the client knows."""
    name = error.field
    for theirs, ours in _RENAMED:
        name = re.sub(theirs, ours, name)
    if name == error.field:
        return error
    renamed = type(error)(name, error.value, error.limit)
    renamed.counted = error.counted
    return renamed
