"""The OpenAI HTTP front door."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
from crossdock.proto.types import SamplingParams
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch import tracing
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor import openai_format as fmt
from crossdock.router.frontdoor.frontend import Arrival, Extras, Frontend
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
from crossdock.router.frontdoor.validate import UNLIMITED

log = logging.getLogger(__name__)

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TENANT_HEADER = "X-Crossdock-Tenant"
REQUEST_ID_HEADER = "X-Request-Id"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Answer:
    """A request under way and how its answer is to look."""

    stream: ResponseStream
    head: fmt.Head
    n: int
    logprobs: bool
    echo: tuple[str, ...] = ()  # by prompt: text to put before the answer


class HttpServer:
    """Serves one Frontend over the OpenAI API, and its metrics and health."""

    def __init__(
        self, frontend: Frontend, address: str, max_body_bytes: int, created: int | None = None
    ) -> None:
        self._frontend = frontend
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time()) if created is None else created
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
        frontend = self._frontend
        arrival = frontend.arrival(tracing.context_of(request.headers))
        with frontend.refusals_counted():
            body, sampling, n = self._common(await self._read(request, arrival), ChatBody)
            prompt = await frontend.encode_chat(messages_of(body))
        extras = _extras(request, body, UNLIMITED)
        request_id, stream = frontend.submit("messages", [prompt], sampling, n, arrival, extras)
        head = self._head(request_id, body, arrival, chat=True)
        return await self._answer(
            request, body, Answer(stream, head, n, sampling.logprobs is not None)
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        frontend = self._frontend
        arrival = frontend.arrival(tracing.context_of(request.headers))
        with frontend.refusals_counted():
            body, sampling, n = self._common(await self._read(request, arrival), CompletionBody)
            if body.echo and sampling.logprobs is not None:
                raise InvalidRequest("echo", True, "is not supported together with logprobs")
            given = prompts_of(body.prompt)
            frontend.validator.check_prompts("prompt", len(given))
            prompts = []
            for i, one in enumerate(given):
                field = "prompt" if len(given) == 1 else f"prompt[{i}]"
                prompts.append(await frontend.encode(field, one) if isinstance(one, str) else one)
        extras = _extras(request, body, DEFAULT_COMPLETION_TOKENS)
        request_id, stream = frontend.submit("prompt", prompts, sampling, n, arrival, extras)
        echo: tuple[str, ...] = ()
        if body.echo:
            echo = tuple(p if isinstance(p, str) else frontend.text.decode(p) for p in given)
        head = self._head(request_id, body, arrival, chat=False)
        return await self._answer(
            request, body, Answer(stream, head, n, sampling.logprobs is not None, echo)
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

    def _common(self, raw: bytes, kind: type[Body]) -> tuple[Body, SamplingParams, int]:
        """Body, sampling parameters and n, checked as far as they can be without the prompt."""
        frontend = self._frontend
        body = read_body(raw, kind)
        frontend.validator.check_model(body.model or "")
        n = 1 if body.n is None else body.n
        frontend.validator.check_count("n", n)
        sampling = sampling_of(body, frontend.draw_seed())
        frontend.validator.check_sampling(sampling)
        return body, sampling, n

    def _head(
        self, request_id: str, body: SamplingFields, arrival: Arrival, *, chat: bool
    ) -> fmt.Head:
        return fmt.Head(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            created=int(arrival.received_unix),
            model=self._frontend.model_id,
            chat=chat,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    # -- answering ----------------------------------------------------------------------------

    async def _answer(
        self, request: web.Request, body: SamplingFields, answer: Answer
    ) -> web.StreamResponse:
        try:
            if body.stream:
                return await self._stream(request, answer)
            return await self._whole(answer)
        finally:
            answer.stream.close()

    async def _whole(self, answer: Answer) -> web.Response:
        whole: dict[int, Delta] = {}
        async for delta in answer.stream:
            if delta.index in whole:
                whole[delta.index].absorb(delta)
            else:
                whole[delta.index] = delta
        deltas = [whole[index] for index in sorted(whole)]
        if answer.echo:
            for delta in deltas:
                delta.text = answer.echo[delta.index // answer.n] + delta.text
        usages = {delta.index: delta.usage for delta in deltas if delta.usage is not None}
        usage = fmt.usage_of(usages, answer.n)
        names = self._frontend.text
        data = fmt.whole_answer(answer.head, deltas, names, answer.logprobs, usage)
        return web.Response(body=data, content_type="application/json")

    async def _stream(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        # The first token decides between an answer and an HTTP error.
        batch = await answer.stream.batch()
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        writer = EventWriter(answer, self._frontend.text)
        try:
            while batch:
                if data := b"".join([writer.event(delta) for delta in batch]):
                    await response.write(data)
                batch = await answer.stream.batch()
            if answer.head.include_usage:
                usage = fmt.usage_of(writer.usages, answer.n)
                await response.write(fmt.usage_event(answer.head, usage))
            await response.write(fmt.DONE)
        except CrossdockError as error:
            await response.write(fmt.error_event(error))
        except ConnectionResetError:
            log.debug("%s: the client went away", answer.head.id)
        return response

    def _card(self) -> dict[str, Any]:
        model = self._frontend.validator.model
        return {
            "id": model.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "crossdock",
            "context_length": model.context_length,
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


class EventWriter:
    """Turns deltas into server-sent events; remembers what each index has sent."""

    def __init__(self, answer: Answer, names: fmt.TokenNames) -> None:
        self.usages: dict[int, inference_pb2.Usage] = {}
        self._answer = answer
        self._names = names
        self._prefix = answer.head.event_prefix()
        self._begun: dict[int, int] = {}  # index -> characters sent

    def event(self, delta: Delta) -> bytes:
        """Empty where the delta holds nothing to show yet."""
        if delta.usage is not None:
            self.usages[delta.index] = delta.usage
        answer = self._answer
        first = delta.index not in self._begun
        if first and answer.echo:
            delta.text = answer.echo[delta.index // answer.n] + delta.text
        shown = delta.text or delta.finish_reason or (answer.logprobs and delta.logprobs)
        if not shown and not first:
            return b""
        offset = self._begun.get(delta.index, 0)
        self._begun[delta.index] = offset + len(delta.text)
        if answer.head.chat:
            return fmt.chat_event(self._prefix, delta, first, self._names, answer.logprobs)
        return fmt.completion_event(self._prefix, delta, offset, self._names, answer.logprobs)


def _extras(request: web.Request, body: SamplingFields, max_tokens: int) -> Extras:
    return Extras(
        request_id=request.headers.get(REQUEST_ID_HEADER, ""),
        tenant=request.headers.get(TENANT_HEADER, ""),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        default_max_tokens=max_tokens,
    )


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
