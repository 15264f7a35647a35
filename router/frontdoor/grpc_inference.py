"""crossdock.v1.Inference: what Crossdock's own gRPC clients call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc

from crossdock.proto.convert import FINISH_TO_PB, sampling_from_pb
from crossdock.proto.errors import CrossdockError, InvalidRequest
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.dispatch.scored import ScoredPrompt
from crossdock.router.frontdoor.best_of import best, made_of, ranked
from crossdock.router.frontdoor.frontend import NO_OFFER, Frontend, Prepared
from crossdock.router.frontdoor.grpc_access import metadata_of, say_limits, say_model, who
from crossdock.router.frontdoor.grpc_calls import abort, arrival_of, checked, parsed, parser
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.tools.chat import form
from crossdock.router.frontdoor.tools.grpc_chat import calls_to_pb, conversation_of_pb, offer_of_pb
from crossdock.router.frontdoor.tools.offer import Offer
from crossdock.router.frontdoor.tools.reading import Reading
from crossdock.router.frontdoor.validate import UNLIMITED

SERVICE = "crossdock.v1.Inference"
SLICE_ENTRIES = 4096  # tokens of a prompt, and alternatives, in one response


@dataclass(frozen=True)
class Submitted:
    """A request under way."""

    model: str
    request_id: str
    stream: ResponseStream
    reading: Reading | None  # who reads calls out of it, where tools are offered


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

    async def _generate(self, request: Any, context: Any) -> None:
        """While the client reads, a response is sent where its delta is pushed, without a task's
        turn for each token; for one that does not, deltas merge until it does."""
        try:
            request = await parsed(request, pb.GenerateRequest, self._models.default, context)
            submitted = await self._submit(request, context, streams=True)
            stream, response = submitted.stream, Responses(submitted)
            sink = MessageSink(context, response)
            with contextlib.closing(stream):
                if submitted.reading is None:
                    stream.pipe(sink)
                while batch := await stream.batch():
                    sink.behind = True
                    for delta in batch:
                        for scored in sliced(delta.prompt) if delta.prompt is not None else ():
                            await context.write(response.scored(delta.index, scored))
                        await context.write(response(delta))
                    sink.behind = False
        except CrossdockError as error:
            await abort(context, error)

    async def _generate_unary(self, request: Any, context: Any) -> pb.GenerateUnaryResponse:
        try:
            request = await parsed(request, pb.GenerateRequest, self._models.default, context)
            submitted = await self._submit(request, context)
            with contextlib.closing(submitted.stream):
                deltas = await submitted.stream.whole()
                if request.best_of > (n := request.n or 1):
                    deltas = best(deltas, n, request.best_of)
                return await _unary(request, submitted, deltas)
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

    async def _submit(self, request: Any, context: Any, streams: bool = False) -> Submitted:
        common = self._models.default
        arrival = arrival_of(common, context)
        with common.refusals_counted(arrival):
            message: pb.GenerateRequest = checked(request)
            sampling = sampling_from_pb(
                message.sampling, max_tokens=UNLIMITED, seed=common.draw_seed()
            )
            n = message.n or 1
            made = made_of(message.best_of or None, n, sampling, streams)
            offer = offer_of_pb(message.chat) if message.HasField("chat") else NO_OFFER

            async def prepare(frontend: Frontend) -> Prepared:
                guided = sampling
                frontend.validator.check_request(n, sampling)
                own, how = sampling.grammar, frontend.tool_format
                asked = ("sampling.grammar", own) if own is not None else None
                if (wanted := form(asked, offer, frontend.text, how, "chat.")) is not None:
                    guided = await frontend.with_grammar(arrival, sampling, *wanted)
                if made > n:
                    guided = ranked(guided)
                field, prompt = await _prompt(frontend, message, offer)
                return Prepared(field, [prompt], guided, made, offer)

            chosen = await self._models.choose(
                message.model,
                arrival,
                prepare,
                headers=metadata_of(context),
                tenant=message.tenant,
            )
        frontend = chosen.frontend
        request_id, stream = await frontend.submit(
            chosen.prepared,
            arrival,
            request_id=message.request_id,
            tenant=message.tenant,
            priority=message.priority,
            cache_salt=message.cache_salt,
        )
        say_limits(common.gate, context, arrival.visit)
        say_model(context, arrival.visit)
        reading = Reading(offer, frontend.tool_format) if offer.tools else None
        return Submitted(frontend.model_id, request_id, stream, reading)


class Responses:
    """Makes the responses of one stream. Those that bring tokens alone, which most do, are one
    message that is filled again and again."""

    def __init__(self, submitted: Submitted) -> None:
        self._request_id, self._reading = submitted.request_id, submitted.reading
        self._plain = pb.GenerateResponse(request_id=self._request_id)

    def __call__(self, delta: Delta) -> pb.GenerateResponse:
        """What the client gets of a delta; to be serialized before the next one is made."""
        if delta.finish_reason or delta.logprobs or self._reading is not None:
            gained = _gained(delta, self._reading)
            return pb.GenerateResponse(request_id=self._request_id, usage=delta.usage, **gained)
        return self.plain(delta.index, delta.text, delta.token_ids)

    def plain(self, index: int, text: str, token_ids: list[int]) -> pb.GenerateResponse:
        """What it gets of tokens and their text; likewise. For one whose calls are not read."""
        plain = self._plain
        plain.index, plain.text, plain.token_ids[:] = index, text, token_ids
        return plain

    def scored(self, index: int, part: list[pb.TokenLogprobs]) -> pb.GenerateResponse:
        """What it gets of its prompt's log-probabilities."""
        return pb.GenerateResponse(request_id=self._request_id, index=index, prompt_logprobs=part)


class MessageSink:
    """Sends messages where their deltas are pushed, while the client has room for them."""

    __slots__ = ("_offer", "_response", "behind")

    def __init__(self, context: Any, response: Responses) -> None:
        self._offer, self._response = context.offer, response
        self.behind = False  # something that comes before is not sent yet

    def delta(self, delta: Delta) -> bool:
        """See request.Sink."""
        if self.behind or delta.prompt is not None:
            return False
        sent: bool = self._offer(self._response(delta))
        return sent

    def tokens(self, index: int, text: str, token_ids: list[int]) -> bool:
        """See request.Sink."""
        if self.behind:
            return False
        sent: bool = self._offer(self._response.plain(index, text, token_ids))
        return sent


async def _prompt(
    frontend: Frontend, message: pb.GenerateRequest, offer: Offer
) -> tuple[str, list[int]]:
    kind = message.WhichOneof("input")
    if kind == "text":
        return "text", await frontend.encode("text", message.text)
    if kind == "token_ids":
        frontend.validator.check_length("token_ids", len(message.token_ids.ids))
        return "token_ids", list(message.token_ids.ids)
    if kind == "chat":
        conversation = conversation_of_pb(message.chat, offer)
        return "chat.messages", await frontend.encode_chat(conversation)
    raise InvalidRequest("input", None, "one of text, token_ids and chat must be set")


def sliced(prompt: ScoredPrompt) -> Iterator[list[pb.TokenLogprobs]]:
    """Log-probabilities of a prompt in parts, made as they are asked for."""
    tokens = prompt.tokens()
    top = max((part.top for part in prompt.parts), default=0)
    while scored := list(islice(tokens, max(1, SLICE_ENTRIES // (1 + top)))):
        yield scored


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


async def _unary(
    request: pb.GenerateRequest, submitted: Submitted, whole: list[Delta]
) -> pb.GenerateUnaryResponse:
    answer = pb.GenerateUnaryResponse(request_id=submitted.request_id, model=submitted.model)
    for delta in whole:
        completion = answer.completions.add(**_gained(delta, submitted.reading))
        if not request.sampling.HasField("logprobs"):  # then they are best_of's alone
            completion.ClearField("logprobs")
        for scored in sliced(delta.prompt) if delta.prompt is not None else ():
            completion.prompt_logprobs.extend(scored)
            await asyncio.sleep(0)
        if delta.usage is not None:
            answer.usage.completion_tokens += delta.usage.completion_tokens
    if whole and whole[0].usage is not None:  # of all, the prompt is one
        answer.usage.prompt_tokens = whole[0].usage.prompt_tokens
        answer.usage.cached_tokens = whole[0].usage.cached_tokens
    return answer
