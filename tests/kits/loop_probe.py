"""How long an event loop is held, on a clock that stands while others have the processor."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway_rig import Rig

_POST = """
import http.client, sys
address, path, file, kind = sys.argv[1:]
connection = http.client.HTTPConnection(address)
connection.request("POST", path, open(file, "rb").read(), {"Content-Type": kind})
print(connection.getresponse().status)
"""


@dataclass
class Held:
    """Seconds of this process's CPU between two turns of its loop; the client is to be another
    process."""

    longest: float = 0.0
    turns: int = 0


@asynccontextmanager
async def loop_watched() -> AsyncIterator[Held]:
    held = Held()

    async def turn() -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(0)
            now = time.process_time()
            held.longest, last = max(held.longest, now - last), now
            held.turns += 1

    task = asyncio.create_task(turn())
    try:
        yield held
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def post_from_afar(rig: Rig, path: str, body: bytes) -> int:
    """The status that another process gets."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _POST, rig.gateway.http_address, path, file.name),
            "application/json",
            stdout=asyncio.subprocess.PIPE,
        )
        return int((await client.communicate())[0])
