"""A process beside the gateway for what would hold its loop: large bodies and long texts.

JSON of 8 MB takes up to seconds to become Python objects, and a tokenizer a second for a megabyte
of text; either holds the interpreter for as long, whatever thread it runs on. The process is
started at the first need, does one thing at a time, and ends with its gateway.

Frames over its stdin and stdout: four bytes of length, then MessagePack. Asked is [name,
arguments]; answered is [true, result] or [false, class, message, field]. Token ids travel as 8-byte
integers.
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
from crossdock.router.frontdoor.openai_schemas import Body, CompletionBody, prompts_of, read_body
from crossdock.router.frontdoor.validate import check_prompts

INLINE_BYTES = 16_384  # a larger body is parsed by the process
INLINE_CHARACTERS = 4_096  # a longer text is tokenized by it
ANSWER_S = 60.0  # for one question
ENDED_S = 10.0  # for a killed process to be gone
SLICE_TOKENS = 65_536  # of which lists are made without letting others run
MAX_TOKENS = 262_144  # to detokenize
MAX_VALUES = 32_768  # in a large body, beside its prompt


class TextProcess:
    """The gateway's side. Its methods raise what the work raises, and Unavailable where the process
    ended under it."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._thread = ThreadPoolExecutor(1, "text-process")
        self._child: subprocess.Popen[bytes] | None = None

    async def read_body(self, data: bytes, kind: type[Body], strict: bool) -> Body:
        """What openai_schemas.read_body returns; of a completion, ids of prompts are numpy's."""
        if len(data) <= INLINE_BYTES:
            return read_body(data, kind, strict)
        packed = await self._ask("read_body", kind.__name__, strict, data)
        body = msgspec.msgpack.decode(packed, type=kind)
        if isinstance(body, CompletionBody) and isinstance(body.prompt, list):
            body.prompt = [np.frombuffer(p, "<i8") if isinstance(p, bytes) else p
                           for p in body.prompt]  # fmt: skip
        return body

    async def call(self, method: str, *arguments: Any) -> list[int]:
        """The token ids that this method of TextModel returns."""
        packed = np.frombuffer(await self._ask("call", method, list(arguments)), "<i8")
        return await listed(packed)

    def close(self) -> None:
        """Ends the process; what it is asked still is not answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    async def _ask(self, name: str, *arguments: Any) -> Any:
        asked = msgspec.msgpack.encode([name, arguments])
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._thread, self._answer, asked)
        good, *said = msgspec.msgpack.decode(answer)
        if not good:
            raise _error(*said)
        return said[0]

    def _answer(self, asked: bytes) -> bytes:
        """On the thread."""
        child = self._child
        if child is None or child.poll() is not None:
            child = self._child = self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, asked)
            if _readable(child.stdout, ANSWER_S) and (found := _read(child.stdout)):
                return found
        except OSError:
            pass
        self._end()
        raise Unavailable(f"{len(asked)} bytes of a request could not be read or tokenized")

    def _start(self) -> subprocess.Popen[bytes]:
        files = self._files
        about = [files.model_id, str(files.path), files.format, files.digest]
        command = [sys.executable, "-m", __name__, *about]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)  # type: ignore[call-overload]

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait(ENDED_S)
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


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
        try:
            answer = [True, _ANSWERS[name](files, *arguments)]
        except CrossdockError as error:
            answer = [False, type(error).__name__, str(error), getattr(error, "field", "")]
        except (MemoryError, RecursionError, OverflowError) as error:
            said = InvalidRequest("body", type(error).__name__, "cannot be read")
            answer = [False, "InvalidRequest", str(said), "body"]
        _write(answers, msgspec.msgpack.encode(answer))


def _read_body(files: ModelFiles, kind: str, strict: bool, data: bytes) -> bytes:
    body = read_body(data, getattr(openai_schemas, kind), strict)
    if isinstance(body, CompletionBody):
        check_prompts("prompt", len(prompts := prompts_of(body.prompt)))
        body.prompt = [p if isinstance(p, str) else _pack(p) for p in prompts]
    packed = msgspec.msgpack.encode(body)
    _check_size(msgspec.msgpack.decode(packed))
    return packed


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


def _pack(ids: Sequence[int] | np.ndarray) -> bytes:
    try:
        return array("q", ids).tobytes()
    except OverflowError:
        worst = max(ids, key=abs)
        raise InvalidRequest("prompt", worst, "token ids must be of the vocabulary") from None


def _call(files: ModelFiles, method: str, arguments: list[Any]) -> bytes:
    return _pack(getattr(load_text(files), method)(*arguments))


_ANSWERS: dict[str, Callable[..., bytes]] = {"read_body": _read_body, "call": _call}


# -- frames ----------------------------------------------------------------------------------------


def _readable(pipe: IO[bytes], timeout_s: float) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def _write(pipe: IO[bytes], frame: bytes) -> None:
    view = memoryview(struct.pack("<I", len(frame)) + frame)
    while view:
        view = view[pipe.write(view) :]


def _read(pipe: IO[bytes]) -> bytes:
    """The next frame; empty at the end."""
    head = _exactly(pipe, 4)
    return _exactly(pipe, struct.unpack("<I", head)[0]) if head else b""


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := os.read(pipe.fileno(), min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"" if size else b"".join(parts)


if __name__ == "__main__":
    model_id, path, kind, digest = sys.argv[1:]
    main(
        ModelFiles(model_id, Path(path), cast(Any, kind), digest),
        sys.stdin.buffer,
        sys.stdout.buffer,
    )
