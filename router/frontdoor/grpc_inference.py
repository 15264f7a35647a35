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
from crossdock.router.frontdoor.frontend import Frontend, Prepared
from crossdock.router.frontdoor.grpc_access import metadata_of, say_limits, who
from crossdock.router.frontdoor.grpc_calls import abort, arrival_of, checked, parser
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.tools.grpc_chat import conversation_of_pb
from crossdock.router.frontdoor.validate import UNLIMITED

SERVICE = "crossdock.v1.Inference"


class InferenceService:
    """Serves models; messages of more than `max_body_bytes` are refused."""

    def __init__(self, models: Models, max_body_bytes: int) -> None:
        self._models = models
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
            _, request_id, stream = await self._submit(request, context)
            with contextlib.closing(stream):
                async for delta in stream:
                    yield _response(request_id, delta)
        except CrossdockError as error:
            await abort(context, error)

    async def _generate_unary(self, request: Any, context: Any) -> pb.GenerateUnaryResponse:
        try:
            model, request_id, stream = await self._submit(request, context)
            with contextlib.closing(stream):
                return _unary(request_id, model, await stream.whole())
        except CrossdockError as error:
            await abort(context, error)
            raise

    async def _list_models(self, request: Any, context: Any) -> pb.ListModelsResponse:
        try:
            checked(request)
            mine = self._models.of(who(self._models.gate, context).principal)
        except CrossdockError as error:
            await abort(context, error)
        models = [
            pb.Model(
                id=each.model_id, context_length=each.text.context_length, aliases=each.aliases
            )
            for each in mine
        ]
        return pb.ListModelsResponse(models=models)

    async def _submit(self, request: Any, context: Any) -> tuple[str, str, ResponseStream]:
        """The model's name, the request's id and its stream."""
        common = self._models.default
        arrival = arrival_of(common, context)
        with common.refusals_counted(arrival):
            message: pb.GenerateRequest = checked(request)
            sampling = sampling_from_pb(
                message.sampling, max_tokens=UNLIMITED, seed=common.draw_seed()
            )

            async def prepare(frontend: Frontend) -> Prepared:
                guided, n = sampling, message.n or 1
                frontend.validator.check_request(n, sampling)
                if (grammar := sampling.grammar) is not None:
                    guided = await frontend.with_grammar(sampling, "sampling.grammar", grammar)
                field, prompt = await _prompt(frontend, message)
                return Prepared(field, [prompt], guided, n)

            chosen = await self._models.choose(
                message.model,
                arrival,
                prepare,
                headers=metadata_of(context),
                tenant=message.tenant,
            )
        submitted = await chosen.frontend.submit(
            chosen.prepared,
            arrival,
            request_id=message.request_id,
            tenant=message.tenant,
            priority=message.priority,
            cache_salt=message.cache_salt,
        )
        say_limits(common.gate, context, arrival.visit)
        return chosen.frontend.model_id, *submitted


async def _prompt(frontend: Frontend, message: pb.GenerateRequest) -> tuple[str, list[int]]:
    kind = message.WhichOneof("input")
    if kind == "text":
        return "text", await frontend.encode("text", message.text)
    if kind == "token_ids":
        return "token_ids", list(message.token_ids.ids)
    if kind == "chat":
        conversation = conversation_of_pb(message.chat)
        return "chat.messages", await frontend.encode_chat(conversation)
    raise InvalidRequest("input", None, "one of text, token_ids and chat must be set")


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
