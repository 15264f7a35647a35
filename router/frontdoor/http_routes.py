"""The small routes of the HTTP front door: health, metrics, versions, and what is not offered."""

from __future__ import annotations

from functools import partial
from importlib import metadata

import msgspec
from aiohttp import web

from crossdock.router.frontdoor import openapi
from crossdock.router.frontdoor.http_errors import NotOffered
from crossdock.router.frontdoor.models import Models

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NOT_OFFERED = {
    "/v1/embeddings": "embeddings",
    "/v1/moderations": "moderations",
    "/v1/images/generations": "images",
    "/v1/images/edits": "images",
    "/v1/images/variations": "images",
    "/v1/audio/speech": "audio",
    "/v1/audio/transcriptions": "audio",
    "/v1/audio/translations": "audio",
    "/v1/responses/input_tokens": "counting tokens (POST /tokenize does)",
    "/v1/responses/compact": "compaction",
    "/v1/conversations": "conversations",
    "/v1/files": "files",
    "/v1/batches": "batches",
    "/v1/fine_tuning/jobs": "fine-tuning",
    "/v1/assistants": "assistants",
    "/v1/threads": "threads",
    "/v1/vector_stores": "vector stores",
    "/v1/rerank": "reranking",
    "/v1/score": "scoring pairs",
    "/pooling": "pooling",
}


def add_small_routes(router: web.UrlDispatcher, models: Models) -> None:
    """Routes that need no body."""

    async def health(request: web.Request) -> web.StreamResponse:
        ready = models.ready
        status = "ok" if ready else "no worker of some role is connected"
        return web.json_response({"status": status}, status=200 if ready else 503)

    async def metrics(request: web.Request) -> web.StreamResponse:
        text = models.metrics.exposition()
        return web.Response(body=text, headers={"Content-Type": METRICS_CONTENT_TYPE})

    described = msgspec.json.encode(openapi.document())

    async def description(request: web.Request) -> web.StreamResponse:
        return web.Response(body=described, content_type="application/json")

    async def version(request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": metadata.version("crossdock")})

    for path in ("/health", "/ping"):
        router.add_get(path, health)
    router.add_get("/metrics", metrics)
    router.add_get("/version", version)
    router.add_get("/openapi.json", description)
    for path, what in NOT_OFFERED.items():
        router.add_route("*", path, partial(_not_offered, what))


async def _not_offered(what: str, request: web.Request) -> web.StreamResponse:
    raise NotOffered(f"{what}: not offered here; this server completes text and chats")
