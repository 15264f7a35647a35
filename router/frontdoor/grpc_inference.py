"""crossdock.v1.Inference: what Crossdock's own gRPC clients call."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from crossdock.proto.convert import FINISH_TO_PB, sampling_from_pb
from crossdock.proto.errors import CrossdockError, InvalidRequest
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.frontdoor.frontend import NO_OFFER, Frontend
from crossdock.router.frontdoor.grpc_access import say_limits, who
from crossdock.router.frontdoor.grpc_calls import abort, arrival_of, checked, parser
from crossdock.router.frontdoor.tools.chat import form
from crossdock.router.frontdoor.tools.grpc_chat import calls_to_pb, conversation_of_pb, offer_of_pb
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.tools.reading import Reading
from crossdock.router.frontdoor.validate import UNLIMITED

SERVICE = "crossdock.v1.Inference"


class InferenceService:
    """Serves one Frontend; messages of more than `max_body_bytes` are refused."""

    def __init__(self, frontend: Frontend, max_body_bytes: int) -> None:
        self._frontend = frontend
        self._max_body_bytes = max_body_bytes

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server to add."""
        generate = parser(pb.GenerateRequest.FromString, self._max_body_bytes)
        list_models = parser(pb.ListModelsRequest.FromString, self._max_body_bytes)
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self._generate, generate, pb.GenerateResponse.SerializeToString
                ),
                "GenerateUnary": grpc.unary_unary_rpc_method_handler(
                    self._generate_unary, generate, pb.GenerateUnaryResponse.SerializeToString
                ),
                "ListModels": grpc.unary_unary_rpc_method_handler(
                    self._list_models, list_models, pb.ListModelsResponse.SerializeToString
                ),
            },
        )

    async def _generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            request_id, stream, reading = await self._submit(request, context)
            with contextlib.closing(stream):
                async for delta in stream:
                    yield _response(request_id, delta, reading)
        except CrossdockError as error:
            await abort(context, error)

    async def _generate_unary(self, request: Any, context: Any) -> pb.GenerateUnaryResponse:
        try:
            request_id, stream, reading = await self._submit(request, context)
            with contextlib.closing(stream):
                return _unary(request_id, self._frontend.model_id, await stream.whole(), reading)
        except CrossdockError as error:
            await abort(context, error)
            raise

    async def _list_models(self, request: Any, context: Any) -> pb.ListModelsResponse:
        frontend = self._frontend
        try:
            checked(request)
            if not who(frontend.gate, context).principal.may_use(frontend.model_id):
                return pb.ListModelsResponse()
        except CrossdockError as error:
            await abort(context, error)
        model = pb.Model(id=frontend.model_id, context_length=frontend.text.context_length)
        return pb.ListModelsResponse(models=[model])

    async def _submit(
        self, request: Any, context: Any
    ) -> tuple[str, ResponseStream, Reading | None]:
        """Request id and stream, and who reads calls out of it where tools are offered."""
        frontend = self._frontend
        arrival = arrival_of(frontend, context)
        with frontend.refusals_counted(arrival):
            message: pb.GenerateRequest = checked(request)
            sampling = sampling_from_pb(
                message.sampling, max_tokens=UNLIMITED, seed=frontend.draw_seed()
            )
            frontend.validator.check_request(message.model, message.n or 1, sampling)
            own, how = sampling.grammar, frontend.tool_format
            offer = offer_of_pb(message.chat) if message.HasField("chat") else NO_OFFER
            asked = ("sampling.grammar", own) if own is not None else None
            if (wanted := form(asked, offer, frontend.text, how, "chat.")) is not None:
                sampling = await frontend.with_grammar(sampling, *wanted)
            field, prompt = await self._prompt(message, offer)
        request_id, stream = await frontend.submit(
            field,
            [prompt],
            sampling,
            message.n or 1,
            arrival,
            request_id=message.request_id,
            tenant=message.tenant,
            priority=message.priority,
            cache_salt=message.cache_salt,
            offer=offer,
        )
        say_limits(frontend.gate, context, arrival.visit)
        return request_id, stream, Reading(offer, how) if offer.tools else None

    async def _prompt(self, message: pb.GenerateRequest, offer: Offer) -> tuple[str, list[int]]:
        kind = message.WhichOneof("input")
        if kind == "text":
            return "text", await self._frontend.encode("text", message.text)
        if kind == "token_ids":
            return "token_ids", list(message.token_ids.ids)
        if kind == "chat":
            conversation = conversation_of_pb(message.chat, offer)
            return "chat.messages", await self._frontend.encode_chat(conversation)
        raise InvalidRequest("input", None, "one of text, token_ids and chat must be set")


def _response(request_id: str, delta: Delta, reading: Reading | None) -> pb.GenerateResponse:
    gained = _gained(delta, reading)
    return pb.GenerateResponse(request_id=request_id, usage=delta.usage, **gained)


def _gained(delta: Delta, reading: Reading | None) -> dict[str, Any]:
    """What a streamed response and a completion have in common."""
    calls: list[pb.ToolCall] = []
    text, reason = delta.text, delta.finish_reason
    if reading is not None:
        said = reading.take(delta)
        text, reason, calls = said.text, said.finish_reason, calls_to_pb(said.calls)
    return {
        "index": delta.index,
        "text": text,
        "tool_calls": calls,
        "token_ids": delta.token_ids,
        "logprobs": delta.logprobs,
        "finish_reason": FINISH_TO_PB[reason] if reason else None,
        "stop_reason": delta.stop_reason,
        "timings": delta.timings,
    }


def _unary(
    request_id: str, model: str, whole: list[Delta], reading: Reading | None
) -> pb.GenerateUnaryResponse:
    answer = pb.GenerateUnaryResponse(request_id=request_id, model=model)
    for delta in whole:
        answer.completions.add(**_gained(delta, reading))
        if delta.usage is not None:
            answer.usage.completion_tokens += delta.usage.completion_tokens
    if whole and whole[0].usage is not None:  # of all, the prompt is one
        answer.usage.prompt_tokens = whole[0].usage.prompt_tokens
        answer.usage.cached_tokens = whole[0].usage.cached_tokens
    return answer
