"""The gRPC front door: crossdock.v1.Inference, grpc.health.v1 and reflection."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from crossdock.proto.convert import FINISH_TO_PB, sampling_from_pb
from crossdock.proto.errors import (
    ConfigError,
    CrossdockError,
    InvalidRequest,
    Overloaded,
    RequestTooLarge,
)
from crossdock.proto.settings import split_address
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.dispatch import tracing
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.frontend import Arrival, Frontend
from crossdock.router.frontdoor.gate import Visit
from crossdock.router.frontdoor.grpc_access import Guard, enter, metadata_of
from crossdock.router.frontdoor.validate import UNLIMITED

SERVICE = "crossdock.v1.Inference"
HARD_LIMIT_FACTOR = 8  # beyond this many times max_body_bytes gRPC itself refuses a message
GRPC_MOST_BYTES = 2**31 - 1  # an int32
FOREVER_S = 10 * 365 * 86400.0


class GrpcServer:
    """Serves one Frontend. `set_ready` is what health checks and watches see."""

    def __init__(self, frontend: Frontend, address: str, max_body_bytes: int) -> None:
        self._frontend = frontend
        self._max_body_bytes = max_body_bytes
        self._health = health.aio.HealthServicer()
        self._server: Any = None
        self.address = address

    async def start(self) -> None:
        """Raises ConfigError naming the port when it cannot be had."""
        hard_limit = min(self._max_body_bytes * HARD_LIMIT_FACTOR, GRPC_MOST_BYTES)
        self._server = grpc.aio.server(
            interceptors=[Guard(self._frontend.gate)],
            options=[
                ("grpc.so_reuseport", 0),  # else a second gateway would share the port in silence
                ("grpc.max_receive_message_length", hard_limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.server_handshake_timeout_ms", int(1000 * http_limits.HEAD_S)),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.ping_timeout_ms", 5_000),  # else a client that is cut off lives on
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            bound = self._server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise ConfigError(
                "gateway.grpc", f"{self.address}: {_bind_error(self.address)}"
            ) from error
        self.address = f"{self.address.rpartition(':')[0]}:{bound}"
        await self.set_ready(False)
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        """What grpc.health.v1 answers from now on."""
        kinds = health_pb2.HealthCheckResponse
        status = kinds.SERVING if ready else kinds.NOT_SERVING
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    async def stop(self, grace_s: float) -> None:
        """Ends the server; calls under way get `grace_s` seconds."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)

    # -- the methods --------------------------------------------------------------------------

    async def _generate(
        self, request: pb.GenerateRequest | CrossdockError, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        try:
            request_id, stream = await self._submit(request, context)
            with contextlib.closing(stream):
                async for delta in stream:
                    yield _response(request_id, delta)
        except CrossdockError as error:
            await _abort(context, error)

    async def _generate_unary(
        self, request: pb.GenerateRequest | CrossdockError, context: Any
    ) -> pb.GenerateUnaryResponse:
        try:
            request_id, stream = await self._submit(request, context)
            with contextlib.closing(stream):
                return _unary(request_id, self._frontend.model_id, await stream.whole())
        except CrossdockError as error:
            await _abort(context, error)
            raise

    async def _list_models(self, request: Any, context: Any) -> pb.ListModelsResponse:
        frontend = self._frontend
        if not enter(frontend.gate, context).principal.may_use(frontend.model_id):
            return pb.ListModelsResponse()
        model = pb.Model(id=frontend.model_id, context_length=frontend.text.context_length)
        return pb.ListModelsResponse(models=[model])

    async def _submit(
        self, message: pb.GenerateRequest | CrossdockError, context: Any
    ) -> tuple[str, ResponseStream]:
        frontend = self._frontend
        visit = enter(frontend.gate, context)
        try:
            frontend.gate.count(visit)
            return await self._submitted(message, self._arrival(context, visit))
        finally:
            context.set_trailing_metadata(tuple(frontend.gate.headers(visit).items()))

    async def _submitted(
        self, message: pb.GenerateRequest | CrossdockError, arrival: Arrival
    ) -> tuple[str, ResponseStream]:
        frontend = self._frontend
        with frontend.refusals_counted(arrival):
            if isinstance(message, CrossdockError):
                raise message
            sampling = sampling_from_pb(
                message.sampling, max_tokens=UNLIMITED, seed=frontend.draw_seed()
            )
            frontend.validator.check_request(message.model, message.n or 1, sampling)
            field, prompt = await self._prompt(message)
        return frontend.submit(
            field,
            [prompt],
            sampling,
            message.n or 1,
            arrival,
            request_id=message.request_id,
            tenant=message.tenant,
            priority=message.priority,
            cache_salt=message.cache_salt,
        )

    async def _prompt(self, message: pb.GenerateRequest) -> tuple[str, list[int]]:
        kind = message.WhichOneof("input")
        if kind == "text":
            return "text", await self._frontend.encode("text", message.text)
        if kind == "token_ids":
            return "token_ids", list(message.token_ids.ids)
        if kind == "chat":
            plain = [{"role": m.role, "content": m.content} for m in message.chat.messages]
            return "chat.messages", await self._frontend.encode_chat(plain)
        raise InvalidRequest("input", None, "one of text, token_ids and chat must be set")

    def _arrival(self, context: Any, visit: Visit) -> Arrival:
        headers = metadata_of(context)
        timeout_s = context.time_remaining()
        if timeout_s is not None and timeout_s > FOREVER_S:
            timeout_s = None
        return self._frontend.arrival(visit, tracing.context_of(headers), timeout_s)

    def _handlers(self) -> grpc.GenericRpcHandler:
        parse = self._parser(pb.GenerateRequest.FromString)
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self._generate, parse, pb.GenerateResponse.SerializeToString
                ),
                "GenerateUnary": grpc.unary_unary_rpc_method_handler(
                    self._generate_unary, parse, pb.GenerateUnaryResponse.SerializeToString
                ),
                "ListModels": grpc.unary_unary_rpc_method_handler(
                    self._list_models,
                    self._parser(pb.ListModelsRequest.FromString),
                    pb.ListModelsResponse.SerializeToString,
                ),
            },
        )

    def _parser(self, parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        limit = self._max_body_bytes

        def parse_or_say_why(data: bytes) -> Any:
            """An error in place of a message is for the handler to raise."""
            if len(data) > limit:
                size = f"{len(data)} bytes"
                return RequestTooLarge("message", size, f"at most {limit} bytes")
            try:
                return parse(data)
            except DecodeError as error:
                size = f"{len(data)} bytes"
                limit_text = f"must be a valid message with strings in UTF-8: {error}"
                return InvalidRequest("message", size, limit_text)

        return parse_or_say_why


def _response(request_id: str, delta: Delta) -> pb.GenerateResponse:
    return pb.GenerateResponse(request_id=request_id, usage=delta.usage, **_gained(delta))


def _gained(delta: Delta) -> dict[str, Any]:
    """What a streamed response and a completion have in common."""
    return {
        "index": delta.index,
        "text": delta.text,
        "token_ids": delta.token_ids,
        "logprobs": delta.logprobs,
        "finish_reason": FINISH_TO_PB[delta.finish_reason] if delta.finish_reason else None,
        "stop_reason": delta.stop_reason,
        "timings": delta.timings,
    }


def _unary(request_id: str, model: str, whole: list[Delta]) -> pb.GenerateUnaryResponse:
    answer = pb.GenerateUnaryResponse(request_id=request_id, model=model)
    for delta in whole:
        answer.completions.add(**_gained(delta))
        if delta.usage is not None:
            answer.usage.completion_tokens += delta.usage.completion_tokens
    if whole and whole[0].usage is not None:  # of all, the prompt is one
        answer.usage.prompt_tokens = whole[0].usage.prompt_tokens
        answer.usage.cached_tokens = whole[0].usage.cached_tokens
    return answer


async def _abort(context: Any, error: CrossdockError) -> None:
    """Ends the call with the error's status; the details travel as trailing metadata."""
    trailers = list(context.trailing_metadata() or ())  # what was said of limits
    if isinstance(error, Overloaded):
        trailers.append(("retry-after", f"{error.retry_after_s:.0f}"))
    if isinstance(error, InvalidRequest):
        trailers.append(("error-field", error.field.encode("ascii", "replace").decode()))
    trailers.append(("error-type", type(error).__name__))
    trailers.append(("retriable", "true" if error.retriable else "false"))
    with contextlib.suppress(grpc.aio.UsageError):  # the client is gone already
        await context.abort(
            grpc.StatusCode[error.grpc_status], str(error), trailing_metadata=tuple(trailers)
        )


def _bind_error(address: str) -> str:
    """Why gRPC cannot listen there: it does not say, so the system is asked again."""
    host, port = split_address(address)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        return f"port {port} is in use" if in_use else f"port {port}: {error.strerror}"
    return f"gRPC cannot listen on port {port}"
