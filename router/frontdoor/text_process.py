"""A process beside the gateway for what would hold its loop: large bodies and messages, and long
texts.

JSON of 8 MB takes up to seconds to become Python objects, and a tokenizer a second for a megabyte
of text; either holds the interpreter for as long, whatever thread it runs on. The process is
started at the first need, does one thing at a time, and ends with its gateway.

Over its stdin and stdout go pairs of frames, each four bytes of length and then as many: a head in
MessagePack, and what is large as it is. A question's head is [name, arguments], an answer's [] or
[class, message, field] of an error. Token ids travel as 4-byte integers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import numpy as np

from crossdock.model.store import ModelFiles
from crossdock.model.text import load_text
from crossdock.proto import errors
from crossdock.proto.errors import CrossdockError, InvalidRequest, Unavailable
from crossdock.router.frontdoor import openai_schemas
from crossdock.router.frontdoor.child import end
from crossdock.router.frontdoor.in_turn import InTurn
from crossdock.router.frontdoor.large_messages import KINDS, Kind, condensed
from crossdock.router.frontdoor.openai_schemas import Body, CompletionBody, prompts_of, read_body
from crossdock.router.frontdoor.shares import Shares
from crossdock.router.frontdoor.validate import check_prompts

INLINE_BYTES = 16_384  # a larger body is parsed by the process
INLINE_CHARACTERS = 4_096  # a longer text is tokenized by it
ANSWER_S = 60.0  # for one question
SLICE_TOKENS = 65_536  # of which lists are made without letting others run
MAX_TOKENS = 262_144  # to detokenize
MAX_VALUES = 32_768  # in a large body, beside its prompt
MOST_ASKED = 128 * 2**20  # bytes of what waits for the process, which parties share


class TextProcess:
    """The gateway's side. Its methods raise what the work raises, and Unavailable where the process
    ended under it. The parties that ask take turns."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._turns, self._asked = InTurn(), Shares(MOST_ASKED)
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "text-process")
        self._child: subprocess.Popen[bytes] | None = None

    async def read_body(
        self, party: str, parts: Sequence[bytes], kind: type[Body], strict: bool
    ) -> Body:
        """What openai_schemas.read_body returns; of a completion, ids of prompts are numpy's."""
        if sum(map(len, parts)) <= INLINE_BYTES:
            return read_body(b"".join(parts), kind, strict)
        packed = await self._ask(party, parts, "read_body", kind.__name__, strict)
        body = msgspec.msgpack.decode(packed, type=kind)
        if isinstance(body, CompletionBody) and isinstance(body.prompt, list):
            body.prompt = [_unpack(p) if isinstance(p, bytes) else p for p in body.prompt]
        return body

    async def read_message(self, party: str, data: bytes, kind: Kind) -> Any:
        """A message of few enough parts, see large_messages."""
        name = kind.DESCRIPTOR.full_name
        return kind.FromString(bytes(await self._ask(party, (data,), "read_message", name)))

    async def call(self, party: str, method: str, *arguments: Any) -> list[int]:
        """The token ids, or other numbers, that this method of TextModel returns."""
        return await listed(_unpack(await self._ask(party, (), "call", method, list(arguments))))

    def close(self) -> None:
        """Ends the process; what it is asked still is not answered."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        end(self._child)

    async def _ask(
        self, party: str, large: Sequence[bytes], name: str, *arguments: Any
    ) -> bytearray:
        head = msgspec.msgpack.encode([name, arguments])
        loop = asyncio.get_running_loop()
        size = len(head) + sum(map(len, large))
        with self._asked.taken(party, size):
            async with self._turns.turn(party):
                if self._closed:
                    raise Unavailable("the model is served no more, or by another process")
                error, found = await loop.run_in_executor(self._thread, self._answer, head, large)
        if error:
            raise _error(*error)
        return found

    def _answer(self, head: bytes, large: Sequence[bytes]) -> tuple[list[str], bytearray]:
        """On the thread."""
        child = self._child
        if child is None or child.poll() is not None:
            child = self._child = self._start()
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(OSError):
            _write(child.stdin, [head], ANSWER_S)
            _write(child.stdin, large, ANSWER_S)
            if answer := _read(child.stdout, ANSWER_S):
                return msgspec.msgpack.decode(answer), _read(child.stdout, ANSWER_S)
        end(child)
        size = len(head) + sum(map(len, large))
        raise Unavailable(f"{size} bytes of a request could not be read or tokenized")

    def _start(self) -> subprocess.Popen[bytes]:
        files = self._files
        about = [files.model_id, str(files.path), files.format, files.digest]
        command = [sys.executable, "-m", __name__, *about]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child: subprocess.Popen[bytes] = subprocess.Popen(
            command, bufsize=0, start_new_session=True, **pipes
        )  # type: ignore[call-overload]
        assert child.stdin is not None
        os.set_blocking(child.stdin.fileno(), False)
        return child


async def listed(ids: Sequence[int] | np.ndarray) -> list[int]:
    """Token ids as a list, made in slices."""
    if not isinstance(ids, np.ndarray):
        return ids if isinstance(ids, list) else list(ids)
    found: list[int] = []
    for at in range(0, len(ids), SLICE_TOKENS):
        found += ids[at : at + SLICE_TOKENS].tolist()
        await asyncio.sleep(0)
    return found


def _error(name: str, message: str, field: str) -> CrossdockError:
    """An error of the process as it was raised there."""
    kind = getattr(errors, name)
    error: CrossdockError = kind.__new__(kind)
    Exception.__init__(error, message)
    if isinstance(error, InvalidRequest):
        error.field, error.value, error.limit = field, None, message
    return error


# -- the process's side ----------------------------------------------------------------------------


def main(files: ModelFiles, asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answers until nobody asks."""
    while question := _read(asked):
        name, arguments = msgspec.msgpack.decode(question)
        large, error, found = bytes(_read(asked)), [], b""
        try:
            found = _ANSWERS[name](files, large, *arguments)
        except CrossdockError as raised:
            error = [type(raised).__name__, str(raised), getattr(raised, "field", "")]
        except (MemoryError, RecursionError, OverflowError) as raised:
            said = InvalidRequest("body", type(raised).__name__, "cannot be read")
            error = ["InvalidRequest", str(said), "body"]
        _write(answers, [msgspec.msgpack.encode(error)])
        _write(answers, [found])


def _read_body(files: ModelFiles, data: bytes, kind: str, strict: bool) -> bytes:
    body = read_body(data, getattr(openai_schemas, kind), strict)
    if isinstance(body, CompletionBody):
        check_prompts("prompt", len(prompts := prompts_of(body.prompt)))
        body.prompt = [p if isinstance(p, str) else _pack(p) for p in prompts]
    packed = msgspec.msgpack.encode(body)
    _check_size(msgspec.msgpack.decode(packed))
    return packed


def _read_message(files: ModelFiles, data: bytes, kind: str) -> bytes:
    return condensed(data, KINDS[kind])


def _check_size(body: dict[str, Any]) -> None:
    """Bounds what the gateway makes objects of."""
    body.pop("prompt", None)
    if len(body.get("tokens", ())) <= MAX_TOKENS:
        body.pop("tokens", None)
    todo, found = list(body.values()), 0
    while todo:
        value = todo.pop()
        inner = list(value.values()) if isinstance(value, dict) else value
        if isinstance(inner, list):
            found += len(inner)
            if found > MAX_VALUES:
                limit = f"at most {MAX_VALUES} beside the prompt"
                raise InvalidRequest("body", f"{found} values and more", limit)
            todo += inner


def _unpack(packed: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(packed, "<u4")


def _pack(ids: Sequence[int] | np.ndarray) -> bytes:
    try:
        return array("I", ids).tobytes()
    except OverflowError:
        worst = next(id_ for id_ in ids if not 0 <= id_ < 2**32)
        raise InvalidRequest("prompt", worst, "token ids must be of the vocabulary") from None


def _call(files: ModelFiles, data: bytes, method: str, arguments: list[Any]) -> bytes:
    return _pack(getattr(load_text(files), method)(*arguments))


_ANSWERS: dict[str, Callable[..., bytes]] = {
    "read_body": _read_body,
    "read_message": _read_message,
    "call": _call,
}


# -- frames ----------------------------------------------------------------------------------------


def _wait(pipe: IO[bytes], event: int, timeout_s: float | None) -> None:
    """Raises TimeoutError. Without a bound it leaves the waiting to the system."""
    if timeout_s is not None:
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(pipe, event)
        if not poll.poll(1000 * timeout_s):
            raise TimeoutError


def _write(pipe: IO[bytes], parts: Sequence[bytes], timeout_s: float | None = None) -> None:
    for part in (struct.pack("<I", sum(map(len, parts))), *parts):
        view = memoryview(part)
        while view:
            _wait(pipe, select.POLLOUT, timeout_s)
            view = view[os.write(pipe.fileno(), view) :]


def _read(pipe: IO[bytes], timeout_s: float | None = None) -> bytearray:
    """The next frame; empty at the end."""
    head = _exactly(pipe, 4, timeout_s)
    return _exactly(pipe, struct.unpack("<I", head)[0], timeout_s) if head else head


def _exactly(pipe: IO[bytes], size: int, timeout_s: float | None) -> bytearray:
    found = bytearray(size)
    view = memoryview(found)
    while view:
        _wait(pipe, select.POLLIN, timeout_s)
        count = os.readv(pipe.fileno(), [view])
        if not count:
            return bytearray()
        view = view[count:]
    return found


if __name__ == "__main__":
    model_id, path, kind, digest = sys.argv[1:]
    main(
        ModelFiles(model_id, Path(path), cast(Any, kind), digest),
        sys.stdin.buffer,
        sys.stdout.buffer,
    )
