"""The load itself: endpoints that a request can be sent to, and the loops that send them.

Closed loop: `concurrency` requests at any time, the next when one ends. Open loop: each request at
its time whatever the server does; how late the generator was is reported, never hidden.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from crossdock.bench.metrics import RequestRecord
from crossdock.client import API_KEY, AsyncClient, Tls
from crossdock.proto.errors import InvalidRequest


@dataclass(frozen=True)
class Job:
    """One request to send. Times are seconds from the start of the run."""

    index: int
    due_s: float
    token_ids: tuple[int, ...]
    text: str
    output_tokens: int


@dataclass(frozen=True)
class Arrival:
    """What one chunk brought. Counts stand for the whole request so far; None says nothing."""

    carries_tokens: bool
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class Endpoint(Protocol):
    """A server under load. Streams one request; raises what went wrong."""

    def stream(self, job: Job) -> AsyncIterator[Arrival]:
        """Sends one request; its tokens as they arrive. Raises EndpointError."""

    async def close(self) -> None:
        """Ends its connections."""


class EndpointError(Exception):
    """An answer that is no success; `kind` is what it is counted under."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class GrpcEndpoint:
    """A Crossdock gateway; prompts are token ids, output length is exact."""

    def __init__(self, target: str, model: str, timeout_s: float, tls: Tls | None = None) -> None:
        self._client = AsyncClient(target, tls=tls)
        self._model, self._timeout_s = model, timeout_s

    async def stream(self, job: Job) -> AsyncIterator[Arrival]:
        chunks = self._client.stream(
            token_ids=job.token_ids,
            model=self._model,
            max_tokens=job.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            timeout=self._timeout_s,
        )
        count = 0
        async for chunk in chunks:
            count += len(chunk.token_ids)
            usage = chunk.usage
            yield Arrival(
                bool(chunk.token_ids),
                count,
                usage.prompt_tokens if usage else None,
                usage.cached_tokens if usage else None,
            )

    async def close(self) -> None:
        await self._client.close()


class OpenAIEndpoint:
    """Any server of the OpenAI API. `style`: "text" or "ids" for /v1/completions, "chat".

    Asks for exact lengths (ignore_eos, an extension that vLLM, SGLang and Crossdock share) and for
    usage; where chunks carry a running usage it is taken, else the final one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout_s: float,
        style: str = "text",
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._url, self._model, self._style = url.rstrip("/").removesuffix("/v1"), model, style
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls.context() if self._tls else True)
        key = os.environ.get(API_KEY, "")
        return aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            read_bufsize=1 << 20,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )

    async def stream(self, job: Job) -> AsyncIterator[Arrival]:
        if not self._model:
            self._model = await self._first_model()
        path = "chat/completions" if self._style == "chat" else "completions"
        async with self._session.post(f"{self._url}/v1/{path}", json=self._body(job)) as response:
            if response.status != 200:
                words = (await response.text())[:300]
                raise EndpointError(f"HTTP {response.status}", words)
            ended = False
            async for event in server_sent_events(response.content):
                ended = event == "[DONE]"
                if not ended:
                    yield read_openai_event(json.loads(event))
            if not ended:
                raise EndpointError("BrokenStream", "the stream ended without [DONE]")

    def _body(self, job: Job) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": job.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._style == "chat":
            body["messages"] = [{"role": "user", "content": job.text}]
        else:
            body["prompt"] = list(job.token_ids) if self._style == "ids" else job.text
        return body

    async def _first_model(self) -> str:
        async with self._session.get(f"{self._url}/v1/models") as response:
            if response.status != 200:
                raise EndpointError(f"HTTP {response.status}", await response.text())
            return str((await response.json())["data"][0]["id"])

    async def close(self) -> None:
        await self._session.close()


async def server_sent_events(lines: Any) -> AsyncIterator[str]:
    """The data of each event of an SSE stream, its lines joined (WHATWG HTML, 9.2.6)."""
    data: list[str] = []
    async for raw in lines:
        line = raw.decode().rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


def read_openai_event(event: dict[str, Any]) -> Arrival:
    """Raises EndpointError for an error sent inside the stream."""
    if error := event.get("error"):
        words = error if isinstance(error, dict) else {"message": str(error)}
        raise EndpointError(str(words.get("type") or "StreamError"), str(words.get("message")))
    carries = any(_has_text(choice) for choice in event.get("choices") or ())
    usage = event.get("usage")
    if not usage:
        return Arrival(carries)
    details = usage.get("prompt_tokens_details") or {}
    return Arrival(
        carries,
        usage.get("completion_tokens"),
        usage.get("prompt_tokens"),
        details.get("cached_tokens") or 0,
    )


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def open_endpoint(
    url: str, model: str, timeout_s: float, style: str = "text", tls: Tls | None = None
) -> Endpoint:
    """grpc(s)://host:port, or http(s)://host:port of an OpenAI server. Raises InvalidRequest."""
    parts = urlsplit(url)
    if parts.scheme in ("grpc", "grpcs") and parts.netloc:
        return GrpcEndpoint(url, model, timeout_s, tls)
    if parts.scheme in ("http", "https") and parts.netloc:
        return OpenAIEndpoint(url, model, timeout_s, style, tls)
    raise InvalidRequest("endpoint", url, "give grpc://host:port or http://host:port")


async def send(endpoint: Endpoint, job: Job, started: float) -> RequestRecord:
    """One request from first byte to last; what goes wrong is in the record, never raised."""
    clock = time.perf_counter
    sent = clock() - started
    arrivals: list[float] = []
    output = prompt = cached = None
    error = message = ""
    try:
        async with contextlib.aclosing(endpoint.stream(job)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.carries_tokens:
                    arrivals.append(clock() - started)
                output = output if chunk.output_tokens is None else chunk.output_tokens
                prompt = prompt if chunk.prompt_tokens is None else chunk.prompt_tokens
                cached = cached if chunk.cached_tokens is None else chunk.cached_tokens
    except Exception as raised:
        error, message = _kind(raised), str(raised) or type(raised).__name__
    finished = clock() - started
    output = len(arrivals) if output is None else output
    if not error and output != job.output_tokens:
        error, message = "WrongLength", f"{output} tokens came, {job.output_tokens} were asked for"
    return RequestRecord(
        index=job.index,
        due_s=job.due_s,
        sent_s=sent,
        arrivals_s=tuple(arrivals),
        finished_s=finished,
        prompt_tokens=len(job.token_ids) if prompt is None else prompt,
        output_tokens=output,
        cached_tokens=cached or 0,
        error=error,
        message=message,
    )


def _kind(raised: Exception) -> str:
    if isinstance(raised, EndpointError):
        return raised.kind
    if isinstance(raised, TimeoutError):
        return "Timeout"
    return type(raised).__name__


Progress = Callable[[RequestRecord], None]


async def closed_loop(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    concurrency: int,
    duration_s: float = 0.0,
    progress: Progress = lambda record: None,
) -> list[RequestRecord]:
    """At most `concurrency` at once. With a duration, nothing new is sent after it."""
    started = time.perf_counter()
    waiting: Iterator[Job] = iter(jobs)
    records: list[RequestRecord] = []

    async def sender() -> None:
        for job in waiting:
            now = time.perf_counter() - started
            if duration_s and now >= duration_s:
                return
            records.append(await send(endpoint, replace(job, due_s=now), started))
            progress(records[-1])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(sender())
    return sorted(records, key=lambda record: record.index)


async def open_loop(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    duration_s: float = 0.0,
    progress: Progress = lambda record: None,
) -> list[RequestRecord]:
    """Each job at its `due_s`, however many are in flight."""
    started = time.perf_counter()
    records: list[RequestRecord] = []

    async def sender(job: Job) -> None:
        records.append(await send(endpoint, job, started))
        progress(records[-1])

    async with asyncio.TaskGroup() as group:
        for job in sorted(jobs, key=lambda each: each.due_s):
            if duration_s and job.due_s >= duration_s:
                break
            await asyncio.sleep(max(0.0, job.due_s - (time.perf_counter() - started)))
            group.create_task(sender(job))
    return sorted(records, key=lambda record: record.index)
