"""One gRPC call: its handler's task, and what the handler sees of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from crossdock.router.frontdoor.http2 import bounds, headers
from crossdock.router.frontdoor.http2.headers import Head, Metadata
from crossdock.router.frontdoor.http2.stream import Outbox, Stream, Unread

log = logging.getLogger(__name__)

DEADLINE_GRACE_S = 0.1  # for a handler to say itself how far it got
INLINE_BYTES = 1 << 10  # a longer message is inflated beside the loop
OK = grpc.StatusCode.OK.value[0]
STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Aborted(Exception):
    """A handler ended its call; nothing but the server catches it."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a server does with every call."""

    handler: Callable[[str], grpc.RpcMethodHandler | None]  # of a method's path
    admit: Callable[[Context], None]  # raises what `refuse` tells the client
    refuse: Callable[[Context, Exception], None]
    limits: Mapping[str, int]  # bytes of a message, by the paths of methods that take large ones

    def limit(self, path: str) -> int:
        """Bytes of a message to the method of this path."""
        return self.limits.get(path, bounds.MESSAGE_BYTES)


class Context:
    """What handlers know of a call, by the names that grpc.aio gives it, and how they answer."""

    __slots__ = (
        *("_began", "began", "_code", "_deadline", "_details", "_head", "_out", "_peer", "_rules"),
        *("_leading", "_serialize", "_stream", "_task", "_timer", "_trailing", "on_end"),
    )

    def __init__(self, head: Head, stream: Stream, out: Outbox, rules: Rules, peer: str) -> None:
        self._head, self._stream, self._out, self._rules = head, stream, out, rules
        self._peer = peer
        self._leading: Metadata = ()
        self._trailing: Metadata = ()
        self._began = False  # the answer's head is sent
        self._code, self._details = OK, ""
        self._serialize: Any = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self.on_end: Callable[[int], object] = lambda stream_id: None  # is called once

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs the call's handler."""
        self.began = time.monotonic()
        if self._head.timeout_s is not None:
            self._deadline = time.monotonic() + self._head.timeout_s
            grace_s = self._head.timeout_s + DEADLINE_GRACE_S
            self._timer = loop.call_later(grace_s, self._deadline_passed)
        self._task = loop.create_task(self._run())

    # -- for handlers -------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The path of the method: /SERVICE/METHOD."""
        return self._head.path

    def peer(self) -> str:
        """The client's address as gRPC writes it."""
        return self._peer

    def invocation_metadata(self) -> Metadata:
        """What the client sent with the call."""
        return self._head.metadata

    def time_remaining(self) -> float | None:
        """Seconds until its deadline; None where it has none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def set_initial_metadata(self, leading: Metadata) -> None:
        """What the client gets before the first message; an answer without any has none."""
        self._leading = leading

    def trailing_metadata(self) -> Metadata:
        """What was set."""
        return self._trailing

    def set_trailing_metadata(self, trailing: Metadata) -> None:
        """What the client gets with the status."""
        self._trailing = trailing

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """Ends the call with this status. Raises what ends the handler."""
        self.refuse(code, details, trailing_metadata)
        raise Aborted(details)

    def refuse(self, code: grpc.StatusCode, details: str, trailing: Metadata) -> None:
        """Sets the status, and the trailing metadata where some is given."""
        self._code, self._details = int(code.value[0]), details
        self._trailing = trailing or self._trailing

    def offer(self, message: Any) -> bool:
        """Sends a message in this turn of the loop; False, and nothing is sent, where the client
        has no room for it now, or is gone."""
        if not self._began:
            self._begin()
        return self._stream.offer(self._serialize(message))

    async def write(self, message: Any) -> None:
        """Sends a message as soon as the client has room for it."""
        self._begin()
        await self._stream.send(self._serialize(message))

    # -- for the connection -------------------------------------------------------------------

    def end(self, code: grpc.StatusCode | None, details: str = "") -> None:
        """Ends the call from outside, with a status where the client is still there to get it."""
        if code is not None:
            self.refuse(code, details, ())
            self._finish()
        else:
            self._close()
        if self._task is not None:
            task, self._task = self._task, None  # which would keep it, and why it was cancelled
            task.cancel()

    # -- the call -----------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._serve()
        except Aborted:
            pass
        except Unread as unread:
            log.info("%s, %s: %s", self._peer, self._head.path, unread)
        except asyncio.CancelledError:
            self.refuse(grpc.StatusCode.CANCELLED, "the call was cancelled", ())
        except Exception as error:
            log.exception("%s failed", self._head.path)
            self.refuse(grpc.StatusCode.INTERNAL, f"internal error: {error!r}", ())
        self._finish()

    async def _serve(self) -> None:
        handler = self._rules.handler(self._head.path)
        if handler is None:
            await self.abort(grpc.StatusCode.UNIMPLEMENTED, f"no method {self._head.path!r:.200}")
        if self._head.encoding not in ("identity", "gzip", "deflate"):
            what = f"grpc-encoding {self._head.encoding!r:.50} is not identity, gzip or deflate"
            await self.abort(grpc.StatusCode.UNIMPLEMENTED, what)
        try:
            self._rules.admit(self)
        except Exception as error:
            self._rules.refuse(self, error)
            if handler.request_streaming:
                await self._begun()
            return
        parse, self._serialize = handler.request_deserializer, handler.response_serializer
        given = self._messages(parse) if handler.request_streaming else await self._message(parse)
        if not handler.response_streaming:
            behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
            await self.write(await behavior(given, self))
            return
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
        answers = behavior(given, self)
        if not hasattr(answers, "__aiter__"):
            await answers  # which writes them itself
            return
        async with contextlib.aclosing(answers):
            async for answer in answers:
                await self.write(answer)

    async def _begun(self) -> None:
        """Waits a moment for a client's first message: one that is answered before it has sent
        anything, gRPC's own client takes for broken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bounds.FIRST_S):
                await self._stream.heard()

    async def _message(self, parse: Callable[[bytes], Any]) -> Any:
        """The only message of a call."""
        found = None
        if self._stream.has_message:
            found = await self._next(parse)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(bounds.WHOLE_S):
                    found = await self._next(parse)
        if found is None:
            why = f"the call has one message, which is whole within {bounds.WHOLE_S:g} s"
            await self.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        return found

    async def _messages(self, parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while (message := await self._next(parse)) is not None:
            yield message

    async def _next(self, parse: Callable[[bytes], Any]) -> Any:
        """The next message; None after the last."""
        found = await self._stream.message()
        if found is None:
            if self._stream.failure is not None:
                status, why = self._stream.failure
                await self.abort(STATUS[status], why)
            return None
        compressed, data = found
        if compressed:
            data = await self._inflated(data)
        try:
            return parse(data)
        except Exception as error:  # of parsers that are not ours
            why = f"message: it cannot be read: {error}"
            await self.abort(grpc.StatusCode.INVALID_ARGUMENT, why)

    async def _inflated(self, data: bytes) -> bytes:
        if self._head.encoding == "identity":
            await self.abort(grpc.StatusCode.INTERNAL, "a compressed message, and no grpc-encoding")
        try:
            limit = self._rules.limit(self._head.path)
            if len(data) > INLINE_BYTES:
                return await asyncio.to_thread(_inflate, data, limit)
            return _inflate(data, limit)
        except ValueError as error:
            await self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except zlib.error:
            why = f"{len(data)} bytes are not {self._head.encoding}"
            await self.abort(grpc.StatusCode.INTERNAL, why)

    def _begin(self) -> None:
        if not self._began and self._stream.open:
            self._began = True
            head = headers.HEAD + headers.block(self._leading)
            self._out.head(self._stream.id, head, end=False)

    def _finish(self) -> None:
        """Sends the status, unless the call is over already."""
        if self._stream.open:
            try:
                told = headers.trailers(self._code, self._details, self._trailing)
            except Exception:  # of metadata that no client could read; its call ends nevertheless
                log.exception("%s: the trailing metadata", self._head.path)
                told = headers.trailers(13, "the trailing metadata cannot be sent", ())
            self._stream.finish(told if self._began else headers.HEAD + told)
        self._close()

    def _close(self) -> None:
        self._stream.close()
        if self._timer is not None:
            self._timer.cancel()
        on_end, self.on_end = self.on_end, lambda stream_id: None
        on_end(self._stream.id)

    def _deadline_passed(self) -> None:
        self.end(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")


def _inflate(data: bytes, limit: int) -> bytes:
    """gzip or deflate. Raises ValueError past `limit` bytes, zlib.error."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    whole = inflater.decompress(data, limit + 1)
    if len(whole) > limit:
        raise ValueError(f"a message of over {limit} bytes, inflated; at most {limit} are read")
    if not inflater.eof:
        raise zlib.error("cut short")
    return whole
