"""The body of a streamed answer: from the step that made tokens to the socket in one turn."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from crossdock.proto.errors import CrossdockError
from crossdock.router.dispatch.request import Delta, ResponseStream
from crossdock.router.frontdoor import openai_format as fmt

log = logging.getLogger(__name__)

MOST_UNSENT = 1 << 16  # bytes that a client's connection holds back; beyond, deltas merge
KEEP_ALIVE = b": keep-alive\n\n"  # which clients of event streams skip
HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class EventStream(web.StreamResponse):
    """An answer whose head goes out with its first event."""

    _send_headers_immediately = False


class EventSink:
    """Writes events where their deltas are pushed, as chunks of the body. Not the last one, with
    which the answer ends."""

    __slots__ = ("_answer", "_transport", "behind")

    def __init__(self, transport: asyncio.Transport, answer: fmt.Answer) -> None:
        self._transport, self._answer = transport, answer
        self.behind = True  # something that comes before is not sent yet

    def delta(self, delta: Delta) -> bool:
        """See request.Sink."""
        if delta.finish_reason is not None or delta.prompt is not None or not self._has_room():
            return False
        if data := self._answer.event(delta):
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def tokens(self, index: int, text: str, token_ids: list[int]) -> bool:
        """See request.Sink."""
        transport = self._transport
        if self.behind or transport.is_closing() or transport.get_write_buffer_size() > MOST_UNSENT:
            return False
        data = self._answer.text_event(index, text)
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return data is not None

    def _has_room(self) -> bool:
        transport = self._transport
        if self.behind or transport.is_closing():
            return False
        return transport.get_write_buffer_size() <= MOST_UNSENT


async def first_batch(
    request: web.Request, response: web.StreamResponse, stream: ResponseStream, keep_alive_s: float
) -> list[Delta]:
    """The first batch. It decides between an answer and an HTTP error, unless it takes so long that
    the answer has to begin without it: then a comment goes out each `keep_alive_s` seconds."""
    while True:
        try:
            async with asyncio.timeout(keep_alive_s):
                return await stream.batch()
        except TimeoutError:
            if not response.prepared:
                await response.prepare(request)
            await response.write(KEEP_ALIVE)


async def send_events(
    request: web.Request,
    response: web.StreamResponse,
    stream: ResponseStream,
    answer: fmt.Answer,
    batch: list[Delta],
) -> None:
    """Sends what `stream` gives as server-sent events, `batch` first, to its end.

    While the client reads, an event is written where its delta is pushed, without a task's turn
    for each token; for one that does not, deltas merge until it does.
    """
    transport, sink = request.transport, None
    if response.headers.get("Transfer-Encoding") == "chunked" and transport is not None:
        sink = EventSink(transport, answer)
        stream.pipe(sink)
    try:
        while batch:
            await answer.prepare(batch)
            data = b"".join([answer.event(delta) for delta in batch])
            if stream.done and answer.ends_at_once:  # then that is one write
                return await response.write_eof(data + answer.last_events())
            if data:
                await response.write(data)
                if sink is not None:
                    sink.behind = False  # the head is on its way as well
            batch = await stream.batch()
            if sink is not None:
                sink.behind = True
        await response.write_eof(await answer.end())
    except CrossdockError as error:
        await response.write(answer.failed(error))
    except ConnectionError:
        log.debug("%s: the client went away", answer.request_id)
    except Exception:  # the head is out: an answer of its own would be read as part of this one
        log.exception("%s: an event could not be made", answer.request_id)
        await response.write(
            answer.failed(CrossdockError("internal error; the gateway's log has it"))
        )
