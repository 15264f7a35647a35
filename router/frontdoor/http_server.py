"""The OpenAI HTTP front door."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from aiohttp import HttpVersion11, web

from crossdock.proto.errors import ConfigError, CrossdockError
from crossdock.proto.settings import split_address
from crossdock.router.config import HttpSettings
from crossdock.router.dispatch import tracing
from crossdock.router.dispatch.request import ResponseStream
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor import openai_format as fmt
from crossdock.router.frontdoor.best_of import best, made_of, ranked
from crossdock.router.frontdoor.frontend import Arrival, Frontend, Prepared
from crossdock.router.frontdoor.http_access import TENANT_HEADER, guard, visit_of, with_limits
from crossdock.router.frontdoor.http_body import Bodies, check_media_type
from crossdock.router.frontdoor.http_cors import Cors
from crossdock.router.frontdoor.http_errors import ExpectationFailed, Handler, answered
from crossdock.router.frontdoor.http_routes import add_small_routes
from crossdock.router.frontdoor.http_stream import HEADERS, EventStream, first_batch, send_events
from crossdock.router.frontdoor.http_tokenize import add_tokenize_routes
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.openai_logprobs import MOST_BEFORE
from crossdock.router.frontdoor.openai_prompt import PromptAnswers
from crossdock.router.frontdoor.openai_schemas import (
    DEFAULT_COMPLETION_TOKENS,
    Body,
    ChatBody,
    CompletionBody,
    SamplingFields,
    StreamOptions,
    prompts_of,
    sampling_of,
)
from crossdock.router.frontdoor.responses import ResponsesDoor
from crossdock.router.frontdoor.responses_store import ResponseStore
from crossdock.router.frontdoor.tls import DoorCertificates, TlsSite
from crossdock.router.frontdoor.tools.answer import ToolAnswer
from crossdock.router.frontdoor.tools.chat import conversation_of, form_of, tools_of
from crossdock.router.frontdoor.validate import UNLIMITED, check_label, check_prompts

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)  # the client's, or one that was made for it


Asked = TypeVar("Asked", bound=SamplingFields)


class HttpServer:
    """Serves models over the OpenAI API, and the gateway's metrics and health."""

    def __init__(
        self,
        models: Models,
        address: str,
        max_body_bytes: int,
        settings: HttpSettings | None = None,
        certificates: DoorCertificates | None = None,
        responses: ResponseStore | None = None,
    ) -> None:
        self._models = models
        self._settings = settings or HttpSettings()
        most_reading = int(1_000_000 * self._settings.max_reading_mb)
        self._bodies = Bodies(max_body_bytes, most_reading)
        self._cors = Cors(self._settings.cors)
        self._created = int(time.time())
        self._runner: http_limits.Runner | None = None
        self._certificates, self._responses = certificates, responses
        self.address = address

    async def start(self) -> None:
        """Raises ConfigError naming the port when it cannot be had."""
        app = web.Application(middlewares=[guard(self._models.gate)])
        app.on_response_prepare.append(with_limits(self._models.gate))
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._list)
        if self._responses is not None:
            ResponsesDoor(self._responses, self._read, self._serve).add_routes(app.router)
        app.router.add_get("/v1/models/{id:.+}", self._model)
        add_small_routes(app.router, self._models)
        add_tokenize_routes(app.router, self._models, self._read_small)
        metrics = self._models.metrics
        self.routes = app.router
        self._runner = runner = http_limits.Runner(
            app, self._around, metrics.outcome, shutdown_timeout=1.0
        )
        metrics.gauge("http_connections", "Open HTTP connections", lambda: runner.connections)
        metrics.gauge(
            "http_reading_bytes", "Held by bodies not parsed yet", lambda: self._bodies.held
        )
        await runner.setup()
        host, port = split_address(self.address)
        site: web.BaseSite = web.TCPSite(runner, host, port)
        if self._certificates is not None:
            site = TlsSite(runner, host, port, self._certificates.http())
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            why = "port {} is in use" if error.errno == 98 else "port {}: {}"
            raise ConfigError(
                "gateway.http", f"{self.address}: {why.format(port, error.strerror)}"
            ) from error
        self.address = f"{self.address.rpartition(':')[0]}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Ends the server and its connections."""
        if self._runner is not None:
            await self._runner.cleanup()

    # -- routes -------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        async def read(frontend: Frontend, body: ChatBody) -> tuple[str, list[list[int]]]:
            conversation = conversation_of(body, tools_of(body))
            return "messages", [await frontend.encode_chat(conversation)]

        body = partial(self._read, request, kind=ChatBody)
        return await self._serve(request, body, read, UNLIMITED, fmt.ChatAnswer)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        async def read(frontend: Frontend, body: CompletionBody) -> tuple[str, list[list[int]]]:
            given = prompts_of(body.prompt)
            prompts: list[Any] = []
            check_prompts("prompt", len(given))
            for i, one in enumerate(given):
                field = "prompt" if len(given) == 1 else f"prompt[{i}]"
                prompts.append(await frontend.encode(field, one) if isinstance(one, str) else one)
            return "prompt", prompts

        body = partial(self._read, request, kind=CompletionBody)
        return await self._serve(
            request, body, read, DEFAULT_COMPLETION_TOKENS, fmt.CompletionAnswer
        )

    async def _list(self, request: web.Request) -> web.StreamResponse:
        principal = visit_of(request).principal
        cards = [self._card(frontend) for frontend in self._models.of(principal)]
        cards += [self._route_card(name) for name in self._models.routes_of(principal)]
        return web.json_response({"object": "list", "data": cards})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        name, principal = request.match_info["id"], visit_of(request).principal
        if name in self._models.routes_of(principal):
            return web.json_response(self._route_card(name))
        return web.json_response(self._card(self._models.seen(name, principal)))

    # -- reading ------------------------------------------------------------------------------

    async def _read(self, request: web.Request, arrival: Arrival, kind: type[Body]) -> Body:
        check_media_type(request)
        with self._bodies.reading() as one:
            parts = await self._bodies.read(one, request, arrival.deadline)
            party, strict = visit_of(request).principal.party, self._settings.strict
            return await self._models.default.aside.read_body(party, parts, kind, strict)

    async def _read_small(self, request: web.Request, kind: Any) -> Any:
        """The body of a request that asks for no tokens."""
        common = self._models.default
        arrival = common.arrival(visit_of(request))
        with common.refusals_counted(arrival):
            return await self._read(request, arrival, kind)

    # -- answering ----------------------------------------------------------------------------

    async def _serve(
        self,
        request: web.Request,
        read_body: Callable[[Arrival], Awaitable[Asked]],
        read_prompts: Callable[[Frontend, Asked], Awaitable[tuple[str, list[list[int]]]]],
        default_max_tokens: int,
        answer_kind: Callable[..., fmt.Answer],
    ) -> web.StreamResponse:
        """Answers a request for tokens; `read_prompts` gives the prompts' ids and their field."""
        common, headers = self._models.default, request.headers
        arrival = common.arrival(visit_of(request), tracing.context_of(headers))
        tenant = headers.get(TENANT_HEADER, "")
        with common.refusals_counted(arrival):
            body = await read_body(arrival)
            n, sampling = 1 if body.n is None else body.n, sampling_of(body, common.draw_seed())
            made_each = made_of(body.made, n, sampling, bool(body.stream))
            offer = tools_of(body)

            async def prepare(frontend: Frontend) -> Prepared:
                frontend.validator.check_request(n, sampling, body.echoes)
                asked, guided = form_of(body, offer, frontend.text, frontend.tool_format), sampling
                if asked is not None:
                    guided = await frontend.with_grammar(arrival, sampling, *asked)
                field, prompts = await read_prompts(frontend, body)
                if made_each > n:
                    guided = ranked(guided)
                return Prepared(field, prompts, guided, made_each, offer)

            chosen = await self._models.choose(
                body.model or "", arrival, prepare, headers=headers, tenant=tenant
            )
        frontend = chosen.frontend
        request_id, stream = await frontend.submit(
            chosen.prepared,
            arrival,
            request_id=request[REQUEST_ID],
            tenant=tenant,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            default_max_tokens=default_max_tokens,
        )
        prompts, options = chosen.prepared.prompts, body.stream_options or StreamOptions()
        told_on = options.include_usage and options.continuous_usage_stats
        with contextlib.closing(stream):
            made = answer_kind
            if offer.tools and made is fmt.ChatAnswer:
                made = partial(ToolAnswer, offer=offer, how=frontend.tool_format)
            answer = made(
                frontend.text,
                request_id,
                fingerprint=_fingerprint(frontend),
                created=int(arrival.received_unix),
                model=frontend.model_id,
                n=n,
                logprobs=sampling.logprobs is not None,
                include_usage=bool(options.include_usage),
                lengths=[*map(len, prompts)] if told_on else (),
                prompts=await _told_of_prompts(frontend, body, n, prompts),
            )
            if body.stream:
                return await self._stream(request, stream, answer)
            deltas = await stream.whole()
            if made_each > n:
                deltas = best(deltas, n, made_each)
            data = await answer.told(deltas)
            return web.Response(body=data, content_type="application/json")

    async def _stream(
        self, request: web.Request, stream: ResponseStream, answer: fmt.Answer
    ) -> web.StreamResponse:
        response = EventStream(headers=HEADERS)
        if request.version < HttpVersion11:  # which knows no chunks: the end is the connection's
            response.force_close()
        self._add_headers(request, response)
        try:
            batch = await first_batch(request, response, stream, self._settings.keep_alive_s)
        except CrossdockError as error:
            if not response.prepared:
                raise
            await response.write(answer.failed(error))
            return response
        if not response.prepared:
            await response.prepare(request)
        await send_events(request, response, stream, answer, batch)
        return response

    def _route_card(self, name: str) -> dict[str, Any]:
        """What is true of any model."""
        return {"id": name, "object": "model", "created": self._created, "owned_by": "crossdock"}

    def _card(self, frontend: Frontend) -> dict[str, Any]:
        return {
            **self._route_card(frontend.model_id),
            "context_length": frontend.text.context_length,
            "aliases": list(frontend.aliases),
        }

    # -- around every answer ------------------------------------------------------------------

    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        async def identified(request: web.Request) -> web.StreamResponse:
            if given := request.headers.get(REQUEST_ID_HEADER):
                check_label(REQUEST_ID_HEADER, given)
                request[REQUEST_ID] = given
            if request.headers.get("Expect", "100-continue").lower() != "100-continue":
                raise ExpectationFailed("Expect", request.headers["Expect"], "must be 100-continue")
            return await handler(request)

        request[REQUEST_ID] = uuid.uuid4().hex
        outcome = self._models.metrics.outcome
        response = self._cors.preflight(request) or await answered(request, identified, outcome)
        if not response.prepared:
            self._add_headers(request, response)
        return response

    def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]
        response.headers["Server"] = "crossdock"
        self._cors.add_headers(request, response)


def _fingerprint(frontend: Frontend) -> str:
    """Differs where model, weights or KV layout do."""
    return f"fp_{frontend.dispatcher.view.layout_hash.hex()[:12]}"


async def _told_of_prompts(
    frontend: Frontend, body: SamplingFields, n: int, prompts: Sequence[Sequence[int] | np.ndarray]
) -> PromptAnswers:
    text, whole = frontend.text, body.prompt_logprobs
    ends = [[int(token_id) for token_id in prompt[-MOST_BEFORE:]] for prompt in prompts]
    if not (isinstance(body, CompletionBody) and body.echoes):
        return PromptAnswers(text, n, ends=ends, whole=whole)
    given = prompts_of(body.prompt)
    texts = [each if isinstance(each, str) else await frontend.decode(each) for each in given]
    return PromptAnswers(text, n, texts, ends, frontend.starts, body.echo_logprobs, whole)
