"""inference.GRPCInferenceService: the Open Inference Protocol (KServe v2), with Triton's streams.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import grpc

from crossdock.proto.errors import CrossdockError, InvalidRequest
from crossdock.proto.v1 import kserve_pb2 as pb
from crossdock.router.dispatch.request import ResponseStream
from crossdock.router.frontdoor import kserve_format as fmt
from crossdock.router.frontdoor.frontend import Frontend, Prepared
from crossdock.router.frontdoor.grpc_access import metadata_of, say_limits, say_model, who
from crossdock.router.frontdoor.grpc_calls import abort, arrival_of, checked, parsed, parser
from crossdock.router.frontdoor.http2.call import Aborted
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.openai_schemas import DEFAULT_COMPLETION_TOKENS, sampling_of
from crossdock.router.frontdoor.structured import grammar_of

log = logging.getLogger(__name__)

KSERVE = "inference.GRPCInferenceService"
VERSION = "1"  # of every model
PLATFORM = "crossdock"
MAX_AT_ONCE = 256  # requests of one stream; the next is read when one of them ends
MAX_UNREAD = 64  # responses of one stream that wait for its client; deltas merge meanwhile

Answer = Callable[[Any], Awaitable[None]]


class KServeService:
    """Serves models; messages of more than `max_body_bytes` are refused."""

    def __init__(self, models: Models, max_body_bytes: int) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server to add."""
        unary = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "RepositoryIndex": self._repository_index,
            "ModelInfer": self._infer,
        }
        handlers = {name: self._unary(name, method) for name, method in unary.items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream_infer,
            parser(pb.ModelInferRequest.FromString, self._max_body_bytes),
            pb.ModelStreamInferResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(KSERVE, handlers)

    def _unary(self, name: str, method: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Any) -> Any:
            try:
                return await method(checked(request), context)
            except CrossdockError as error:
                await abort(context, error)
                raise

        return grpc.unary_unary_rpc_method_handler(
            call,
            parser(getattr(pb, f"{name}Request").FromString, self._max_body_bytes),
            getattr(pb, f"{name}Response").SerializeToString,
        )

    # -- what is here -------------------------------------------------------------------------

    async def _server_live(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._models.ready)

    async def _model_ready(self, request: Any, context: Any) -> pb.ModelReadyResponse:
        frontend = self._model(request.name, request.version, context)
        return pb.ModelReadyResponse(ready=frontend.dispatcher.ready)

    async def _server_metadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        version = importlib.metadata.version("crossdock")
        return pb.ServerMetadataResponse(
            name="crossdock", version=version, extensions=["model_configuration"]
        )

    async def _model_metadata(self, request: Any, context: Any) -> pb.ModelMetadataResponse:
        frontend = self._model(request.name, request.version, context)
        answer = pb.ModelMetadataResponse(
            name=frontend.model_id, versions=[VERSION], platform=PLATFORM
        )
        for tensors, told in ((fmt.INPUTS, answer.inputs), (fmt.OUTPUTS, answer.outputs)):
            for name, (datatype, shape) in tensors.items():
                told.add(name=name, datatype=datatype, shape=shape)
        return answer

    async def _model_config(self, request: Any, context: Any) -> pb.ModelConfigResponse:
        frontend = self._model(request.name, request.version, context)
        config = pb.ModelConfig(
            name=frontend.model_id,
            platform=PLATFORM,
            backend=PLATFORM,
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        for name, (datatype, shape) in fmt.INPUTS.items():
            config.input.add(name=name, data_type=_type(datatype), dims=shape, optional=True)
        for name, (datatype, shape) in fmt.OUTPUTS.items():
            config.output.add(name=name, data_type=_type(datatype), dims=shape)
        return pb.ModelConfigResponse(config=config)

    async def _repository_index(self, request: Any, context: Any) -> pb.RepositoryIndexResponse:
        answer = pb.RepositoryIndexResponse()
        for frontend in self._models.of(who(self._models.gate, context).principal):
            ready = frontend.dispatcher.ready
            if ready or not request.ready:
                state = "READY" if ready else "UNAVAILABLE"
                answer.models.add(name=frontend.model_id, version=VERSION, state=state)
        return answer

    # -- inference ----------------------------------------------------------------------------

    async def _infer(self, request: Any, context: Any) -> pb.ModelInferResponse:
        request = await parsed(request, pb.ModelInferRequest, self._models.default, context)
        ask, stream = await self._submit(request, context, streams=False)
        with contextlib.closing(stream):
            return ask.answer(request, await stream.whole())

    async def _stream_infer(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Requests run side by side; one that fails is answered by its error, the rest go on."""
        answers: asyncio.Queue[Any] = asyncio.Queue(MAX_UNREAD)
        room = asyncio.Semaphore(MAX_AT_ONCE)

        async def serve() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    async for request in requests:
                        await room.acquire()
                        task = group.create_task(self._answer(request, context, answers.put))
                        task.add_done_callback(lambda _: room.release())
            except ExceptionGroup as errors:  # what the client sent cannot be read on
                if isinstance(errors.exceptions[0], Aborted):
                    raise errors.exceptions[0] from None
                raise
            await answers.put(None)

        serving = asyncio.create_task(serve())
        try:
            while (answer := await _first(answers.get(), serving)) is not None:
                yield answer
        finally:
            serving.cancel()

    async def _answer(self, request: Any, context: Any, put: Answer) -> None:
        """Answers one request of a stream, whatever becomes of it."""
        try:
            request = await parsed(request, pb.ModelInferRequest, self._models.default, context)
            ask, stream = await self._submit(request, context, streams=True)
            with contextlib.closing(stream):
                if ask.stream:
                    await self._put_deltas(ask, request, stream, put)
                else:
                    whole = ask.answer(request, await stream.whole())
                    whole.parameters[fmt.FINAL].bool_param = True
                    await put(pb.ModelStreamInferResponse(infer_response=whole))
        except CrossdockError as error:
            await put(_failed(request, error))
        except Exception as error:
            log.exception("a request of a stream failed")
            await put(_failed(request, CrossdockError(f"internal error: {error!r}")))

    async def _put_deltas(
        self, ask: fmt.Ask, request: Any, stream: ResponseStream, put: Answer
    ) -> None:
        running = len(ask.prompts) * ask.n
        async for delta in stream:
            running -= delta.finish_reason is not None
            answer = ask.answer(request, [delta])
            answer.parameters["index"].int64_param = delta.index
            answer.parameters[fmt.FINAL].bool_param = not running and not ask.empty_final
            await put(pb.ModelStreamInferResponse(infer_response=answer))
        if ask.empty_final:
            last = pb.ModelInferResponse(model_name=ask.model, id=request.id)
            last.parameters[fmt.FINAL].bool_param = True
            await put(pb.ModelStreamInferResponse(infer_response=last))

    async def _submit(
        self, request: Any, context: Any, *, streams: bool
    ) -> tuple[fmt.Ask, ResponseStream]:
        common = self._models.default
        arrival = arrival_of(common, context)
        with common.refusals_counted(arrival):
            message: pb.ModelInferRequest = checked(request)
            _check_version(message.model_version)
            ask = fmt.Ask.read(message, streams)
            if ask.timeout_s is not None:
                deadline = min(arrival.deadline, arrival.received + ask.timeout_s)
                arrival = replace(arrival, deadline=deadline)
            sampling = sampling_of(ask.body, common.draw_seed())

            async def prepare(frontend: Frontend) -> Prepared:
                guided = sampling
                frontend.validator.check_request(ask.n, sampling)
                if (asked := grammar_of(ask.body)) is not None:
                    guided = await frontend.with_grammar(arrival, sampling, *asked)
                prompts = [
                    await frontend.encode(ask.field, each) if isinstance(each, str) else each
                    for each in ask.prompts
                ]
                return Prepared(ask.field, prompts, guided, ask.n)

            tenant = _tenant(context)
            chosen = await self._models.choose(
                message.model_name,
                arrival,
                prepare,
                headers=metadata_of(context),
                tenant=tenant,
            )
        _, stream = await chosen.frontend.submit(
            chosen.prepared,
            arrival,
            request_id=message.id,
            tenant=tenant,
            priority=ask.priority or ask.body.priority or 0,
            cache_salt=ask.body.cache_salt or "",
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        )
        say_limits(common.gate, context, arrival.visit)
        if not streams:  # where each request may have its own
            say_model(context, arrival.visit)
        return replace(ask, model=chosen.frontend.model_id), stream

    def _model(self, name: str, version: str, context: Any) -> Frontend:
        """The model that is asked about. Raises NotFound, Forbidden or InvalidRequest."""
        frontend = self._models.seen(name, who(self._models.gate, context).principal)
        _check_version(version)
        return frontend


def _check_version(version: str) -> None:
    if version not in ("", VERSION):
        raise InvalidRequest("model_version", version, f"the version is {VERSION}")


async def _first(answer: Coroutine[Any, Any, Any], serving: asyncio.Task[None]) -> Any:
    """The next answer, or what ended `serving` before there was one."""
    getting = asyncio.ensure_future(answer)
    try:
        await asyncio.wait({getting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and serving.exception() is not None:
            await serving
        return await getting
    finally:
        getting.cancel()  # where the client is gone


def _failed(request: Any, error: CrossdockError) -> pb.ModelStreamInferResponse:
    error.__traceback__ = None  # of frames that hold the error
    failed = pb.ModelStreamInferResponse(error_message=str(error))
    failed.infer_response.id = getattr(request, "id", "")
    failed.infer_response.parameters[fmt.FINAL].bool_param = True  # nothing follows of this one
    return failed


def _tenant(context: Any) -> str:
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("x-crossdock-tenant", ""))


def _type(datatype: str) -> Any:
    return getattr(pb, "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")
