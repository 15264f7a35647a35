"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from crossdock.proto.errors import InvalidRequest
from crossdock.router.frontdoor.http_access import visit_of
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.openai_schemas import (
    DetokenizeBody,
    TokenizeBody,
)
from crossdock.router.frontdoor.tools.chat import conversation_of
from crossdock.router.frontdoor.tools.offer import offer_of

ReadBody = Callable[[web.Request, Any], Awaitable[Any]]


def add_tokenize_routes(router: web.UrlDispatcher, models: Models, read: ReadBody) -> None:
    """`read` reads a request's body as a struct."""

    async def tokenize(request: web.Request) -> web.StreamResponse:
        body: TokenizeBody = await read(request, TokenizeBody)
        principal = visit_of(request).principal
        frontend = models.seen(body.model or "", principal).asked_by(principal.party)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt", body.prompt, "either prompt or messages must be given")
        if body.messages is not None:
            offer = offer_of(body.tools, None, None)
            ids = await frontend.encode_chat(conversation_of(body, offer))
        elif body.add_special_tokens is False:
            raise InvalidRequest("add_special_tokens", False, "is not supported by this server")
        else:
            ids = await frontend.encode("prompt", body.prompt or "")
        names = None
        if body.return_token_strs:
            names = await asyncio.to_thread(lambda: [frontend.text.token_text(i) for i in ids])
        found = {
            "count": len(ids),
            "max_model_len": frontend.text.context_length,
            "tokens": ids,
            "token_strs": names,
        }
        return _json(found)

    async def detokenize(request: web.Request) -> web.StreamResponse:
        body: DetokenizeBody = await read(request, DetokenizeBody)
        frontend = models.seen(body.model or "", visit_of(request).principal)
        ids = body.tokens
        if ids:
            frontend.validator.check_prompt("tokens", ids)
        text = await asyncio.to_thread(frontend.text.decode, ids, skip_special_tokens=False)
        return _json({"prompt": text})

    router.add_post("/tokenize", tokenize)
    router.add_post("/detokenize", detokenize)


def _json(found: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(found), content_type="application/json")
