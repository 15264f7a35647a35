"""The OpenAI HTTP front door."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from crossdock.proto.errors import (
    ConfigError,
    CrossdockError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestTooLarge,
)
from crossdock.router.dispatch import tracing
from crossdock.router.dispatch.request import ResponseStream
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor import openai_format as fmt
from crossdock.router.frontdoor.frontend import Arrival, Frontend
from crossdock.router.frontdoor.openai_schemas import (
    DEFAULT_COMPLETION_TOKENS,
    Body,
    ChatBody,
    CompletionBody,
    SamplingFields,
    messages_of,
    prompts_of,
    read_body,
    sampling_of,
)
from crossdock.router.frontdoor.structured import grammar_of
from crossdock.router.frontdoor.validate import UNLIMITED

log = logging.getLogger(__name__)

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TENANT_HEADER = "X-Crossdock-Tenant"
REQUEST_ID_HEADER = "X-Request-Id"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """Serves one Frontend over the OpenAI API, and its metrics and health."""

    def __init__(self, frontend: Frontend, address: str, max_body_bytes: int) -> None:
        self._frontend = frontend
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())
        self._runner: http_limits.Runner | None = None
        self.address = address

    async def start(self) -> None:
        """Raises ConfigError naming the port when it cannot be had."""
        app = web.Application(middlewares=[self._errors], client_max_size=self._max_body_bytes)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{id:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        # A client that goes away cancels its handler, and that its request.
        self._runner = http_limits.Runner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await self._runner.setup()
        host, _, port = self.address.rpartition(":")
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except OSError as error:
            await self._runner.cleanup()
            why = "port {} is in use" if error.errno == 98 else "port {}: {}"
            raise ConfigError(
                "gateway.http", f"{self.address}: {why.format(port, error.strerror)}"
            ) from error
        self.address = f"{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Ends the server and its connections."""
        if self._runner is not None:
            await self._runner.cleanup()

    # -- routes -------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        async def read(body: ChatBody) -> tuple[str, list[list[int]]]:
            return "messages", [await self._frontend.encode_chat(messages_of(body))]

        return await self._serve(request, ChatBody, read, UNLIMITED, fmt.ChatAnswer)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        async def read(body: CompletionBody) -> tuple[str, list[list[int]]]:
            if body.echo and body.logprobs is not None:
                raise InvalidRequest("echo", True, "is not supported together with logprobs")
            frontend, given = self._frontend, prompts_of(body.prompt)
            prompts: list[list[int]] = []
            frontend.validator.check_prompts("prompt", len(given))
            for i, one in enumerate(given):
                field = "prompt" if len(given) == 1 else f"prompt[{i}]"
                prompts.append(await frontend.encode(field, one) if isinstance(one, str) else one)
            return "prompt", prompts

        return await self._serve(
            request, CompletionBody, read, DEFAULT_COMPLETION_TOKENS, fmt.CompletionAnswer
        )

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        self._frontend.validator.check_model(request.match_info["id"])
        return web.json_response(self._card())

    async def _health(self, request: web.Request) -> web.StreamResponse:
        ready = self._frontend.dispatcher.ready
        status = "ok" if ready else "no worker of some role is connected"
        return web.json_response({"status": status}, status=200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        text = self._frontend.dispatcher.metrics.exposition()
        return web.Response(body=text, headers={"Content-Type": METRICS_CONTENT_TYPE})

    # -- reading ------------------------------------------------------------------------------

    async def _read(self, request: web.Request, arrival: Arrival) -> bytes:
        limit, encoding = self._max_body_bytes, request.headers.get("Content-Encoding", "identity")
        if request.content_length is not None and request.content_length > limit:
            size = f"{request.content_length} bytes"
            raise RequestTooLarge("body", size, f"at most {limit} bytes")
        try:
            async with asyncio.timeout(arrival.deadline - arrival.received):
                data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise RequestTooLarge("body", f"over {limit} bytes", f"at most {limit} bytes") from None
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the body was there") from None
        if encoding == "identity":
            return data
        return await asyncio.to_thread(http_limits.inflate, data, encoding.lower(), limit)

    # -- answering ----------------------------------------------------------------------------

    async def _serve(
        self,
        request: web.Request,
        kind: type[Body],
        read_prompts: Callable[[Body], Awaitable[tuple[str, list[list[int]]]]],
        default_max_tokens: int,
        answer_kind: type[fmt.Answer],
    ) -> web.StreamResponse:
        """Answers a request for tokens; `read_prompts` gives the prompts' ids and their field."""
        frontend, headers = self._frontend, request.headers
        arrival = frontend.arrival(tracing.context_of(headers))
        with frontend.refusals_counted():
            body = read_body(await self._read(request, arrival), kind)
            n, sampling = 1 if body.n is None else body.n, sampling_of(body, frontend.draw_seed())
            frontend.validator.check_request(body.model or "", n, sampling)
            if (asked := grammar_of(body)) is not None:
                sampling = await frontend.with_grammar(sampling, *asked)
            field, prompts = await read_prompts(body)
        request_id, stream = frontend.submit(
            field,
            prompts,
            sampling,
            n,
            arrival,
            request_id=headers.get(REQUEST_ID_HEADER, ""),
            tenant=headers.get(TENANT_HEADER, ""),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            default_max_tokens=default_max_tokens,
        )
        with contextlib.closing(stream):
            answer = answer_kind(
                frontend.text,
                request_id,
                created=int(arrival.received_unix),
                model=frontend.model_id,
                n=n,
                logprobs=sampling.logprobs is not None,
                include_usage=bool(body.stream_options and body.stream_options.include_usage),
                echo=self._echo(body),
            )
            if body.stream:
                return await self._stream(request, stream, answer)
            data = answer.whole(await stream.whole())
            return web.Response(body=data, content_type="application/json")

    def _echo(self, body: SamplingFields) -> list[str]:
        if not (isinstance(body, CompletionBody) and body.echo):
            return []
        text = self._frontend.text
        return [p if isinstance(p, str) else text.decode(p) for p in prompts_of(body.prompt)]

    async def _stream(
        self, request: web.Request, stream: ResponseStream, answer: fmt.Answer
    ) -> web.StreamResponse:
        # The first token decides between an answer and an HTTP error.
        batch = await stream.batch()
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        try:
            while batch:
                if data := b"".join([answer.event(delta) for delta in batch]):
                    await response.write(data)
                batch = await stream.batch()
            await response.write(answer.last_events())
        except CrossdockError as error:
            await response.write(fmt.error_event(error))
        except ConnectionResetError:
            log.debug("%s: the client went away", answer.request_id)
        return response

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._frontend.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "crossdock",
            "context_length": self._frontend.text.context_length,
        }

    # -- errors -------------------------------------------------------------------------------

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._runner is not None:
            self._runner.heard(request.protocol)
        try:
            return await handler(request)
        except CrossdockError as error:
            return _error_response(error)
        except web.HTTPException as error:
            reason = f"{error.reason}: {request.method} {request.path}"
            body = {"message": reason, "type": "invalid_request_error"}
            return web.json_response(
                {"error": body | {"param": None, "code": None}},
                status=error.status,
                headers={"Allow": error.headers["Allow"]} if "Allow" in error.headers else None,
            )
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return _error_response(CrossdockError("internal error; the gateway's log has it"))


def _error_response(error: CrossdockError) -> web.Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = f"{error.retry_after_s:.0f}"
    elif error.retriable:
        headers["Retry-After"] = "1"
    return web.Response(
        body=msgspec.json.encode(fmt.error_body(error)),
        status=error.http_status,
        headers=headers,
        content_type="application/json",
    )
