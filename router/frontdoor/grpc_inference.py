"""crossdock.v1.Inference: what Crossdock's own gRPC clients call."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc

from crossdock.proto.convert import FINISH_TO_PB, sampling_from_pb
from crossdock.proto.errors import CrossdockError, InvalidRequest
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.frontdoor.frontend import Frontend
from crossdock.router.frontdoor.grpc_access import say_limits, who
from crossdock.router.frontdoor.grpc_calls import abort, arrival_of, checked, parser
from crossdock.router.frontdoor.tools.grpc_chat import conversation_of_pb
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

    async def _generate(self, request: Any, context: Any) -> None:
        """While the client reads, a response is sent where its delta is pushed, without a task's
        turn for each token; for one that does not, deltas merge until it does."""
        try:
            request_id, stream = await self._submit(request, context)
            response, behind = Responses(request_id), False

            def send(delta: Delta) -> bool:
                return not behind and context.offer(response(delta))

            with contextlib.closing(stream):
                stream.pipe(send)
                while batch := await stream.batch():
                    behind = True
                    for delta in batch:
                        await context.write(response(delta))
                    behind = False
        except CrossdockError as error:
            await abort(context, error)

    async def _generate_unary(self, request: Any, context: Any) -> pb.GenerateUnaryResponse:
        try:
            request_id, stream = await self._submit(request, context)
            with contextlib.closing(stream):
                return _unary(request_id, self._frontend.model_id, await stream.whole())
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

    async def _submit(self, request: Any, context: Any) -> tuple[str, ResponseStream]:
        frontend = self._frontend
        arrival = arrival_of(frontend, context)
        with frontend.refusals_counted(arrival):
            message: pb.GenerateRequest = checked(request)
            sampling = sampling_from_pb(
                message.sampling, max_tokens=UNLIMITED, seed=frontend.draw_seed()
            )
            frontend.validator.check_request(message.model, message.n or 1, sampling)
            if (grammar := sampling.grammar) is not None:
                sampling = await frontend.with_grammar(sampling, "sampling.grammar", grammar)
            field, prompt = await self._prompt(message)
        submitted = await frontend.submit(
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
        say_limits(frontend.gate, context, arrival.visit)
        return submitted

    async def _prompt(self, message: pb.GenerateRequest) -> tuple[str, list[int]]:
        kind = message.WhichOneof("input")
        if kind == "text":
            return "text", await self._frontend.encode("text", message.text)
        if kind == "token_ids":
            return "token_ids", list(message.token_ids.ids)
        if kind == "chat":
            conversation = conversation_of_pb(message.chat)
            return "chat.messages", await self._frontend.encode_chat(conversation)
        raise InvalidRequest("input", None, "one of text, token_ids and chat must be set")


class Responses:
    """Makes the responses of one stream. Those that bring tokens alone, which most do, are one
    message that is filled again and again."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._plain = pb.GenerateResponse(request_id=request_id)

    def __call__(self, delta: Delta) -> pb.GenerateResponse:
        """What the client gets of a delta; to be serialized before the next one is made."""
        if delta.finish_reason or delta.logprobs:
            return pb.GenerateResponse(
                request_id=self._request_id, usage=delta.usage, **_gained(delta)
            )
        plain = self._plain
        plain.index, plain.text, plain.token_ids[:] = delta.index, delta.text, delta.token_ids
        return plain


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
