"""A gateway in miniature: speaks the public contract, computes nothing, records what it was asked.

Token i of every answer is 100 + i, its text " i". A prompt may script its own fate:
"abort STATUS[:ErrorType] [words]" ends with that gRPC status, "hang" answers one token and then
waits for the cancel.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import inference_pb2_grpc

MODEL = "fake"


Inference: Any = inference_pb2_grpc.InferenceServicer
Health: Any = health_pb2_grpc.HealthServicer


class FakeServer(Inference, Health):
    """Serves on a loop of its own thread, for blocking and asyncio callers alike."""

    def __init__(self, tokens_per_chunk: int = 1, cached_tokens: int = 0) -> None:
        self.tokens_per_chunk = tokens_per_chunk
        self.cached_tokens = cached_tokens
        self.requests: list[pb.GenerateRequest] = []
        self.http_bodies: list[dict[str, Any]] = []
        self.deadlines: list[float | None] = []
        self.cancelled = threading.Event()
        self.serving = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self._call(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, function: Callable[[], Awaitable[None]]) -> None:
        asyncio.run_coroutine_threadsafe(function(), self._loop).result(30)  # type: ignore[arg-type]

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.target = f"127.0.0.1:{port}"
        app = web.Application()
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._completions)
        app.router.add_get("/v1/models", self._http_models)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._server.stop(None)
        await self._runner.cleanup()

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        await self._admit(request, context)
        if request.text == "hang":
            yield self._chunk(request, 0, 1)
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        count = request.sampling.max_tokens or 3
        for start in range(0, count, self.tokens_per_chunk):
            yield self._chunk(request, start, min(count, start + self.tokens_per_chunk))
        yield pb.GenerateResponse(
            request_id="r1",
            finish_reason=pb.FINISH_REASON_LENGTH,
            usage=self._usage(request, count),
            timings=pb.Timings(admitted=0.001, first_token=0.25, prefill_worker="prefill-0"),
        )

    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: Any
    ) -> pb.GenerateUnaryResponse:
        await self._admit(request, context)
        count = request.sampling.max_tokens or 3
        whole = self._chunk(request, 0, count)
        return pb.GenerateUnaryResponse(
            request_id="r1",
            model=MODEL,
            usage=self._usage(request, count),
            completions=[
                pb.Completion(
                    index=index,
                    text=whole.text,
                    token_ids=whole.token_ids,
                    logprobs=whole.logprobs,
                    finish_reason=pb.FINISH_REASON_LENGTH,
                    timings=pb.Timings(first_token=0.25),
                )
                for index in reversed(range(request.n or 1))
            ],
        )

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> Any:
        return pb.ListModelsResponse(models=[pb.Model(id=MODEL, context_length=2048)])

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        kind = health_pb2.HealthCheckResponse
        return kind(status=kind.SERVING if self.serving else kind.NOT_SERVING)

    async def _admit(self, request: pb.GenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        if request.text.startswith("abort "):
            _, name, *details = request.text.split(" ", 2)
            status, _, kind = name.partition(":")
            await context.abort(
                grpc.StatusCode[status],
                details[0] if details else "scripted",
                trailing_metadata=(("retry-after", "7"), ("error-type", kind)),
            )

    def _chunk(self, request: pb.GenerateRequest, start: int, end: int) -> pb.GenerateResponse:
        chunk = pb.GenerateResponse(
            request_id="r1",
            text="".join(f" {i}" for i in range(start, end)),
            token_ids=[100 + i for i in range(start, end)],
        )
        if request.sampling.HasField("logprobs"):
            for i in range(start, end):
                chosen = pb.TokenLogprob(token_id=100 + i, logprob=-0.5)
                chunk.logprobs.append(pb.TokenLogprobs(chosen=chosen, top=[chosen]))
        return chunk

    def _usage(self, request: pb.GenerateRequest, completion_tokens: int) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=len(request.token_ids.ids) or len(request.text.split()),
            completion_tokens=completion_tokens,
            cached_tokens=self.cached_tokens,
        )

    async def _http_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.http_bodies.append(body)
        if body["model"] != MODEL:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = request.path.endswith("chat/completions")
        if chat:
            await self._event(response, [{"index": 0, "delta": {"role": "assistant"}}])
        count = body["max_tokens"]
        for start in range(0, count, self.tokens_per_chunk):
            text = "".join(f" {i}" for i in range(start, min(count, start + self.tokens_per_chunk)))
            choice = {"delta": {"content": text}} if chat else {"text": text}
            await self._event(response, [{"index": 0, **choice, "finish_reason": None}])
        usage = {
            "prompt_tokens": 11,
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        await self._event(response, [], usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(
        self, response: web.StreamResponse, choices: list[dict[str, Any]], usage: Any = None
    ) -> None:
        body = json.dumps({"choices": choices, "usage": usage})
        await response.write(f"data: {body}\n\n".encode())
