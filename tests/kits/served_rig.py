"""A rig in a process of its own, for fuzzers: its memory, and how long its loop was held.

As a script it serves; as a module it starts that script and asks it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCKS = 12  # so that no answer is long


@dataclass
class ServedRig:
    """`with ServedRig.start(model) as served: served.http …`."""

    process: subprocess.Popen[str]
    http: str
    grpc: str

    @classmethod
    def start(cls, model: Path) -> ServedRig:
        # What the C library keeps is no leak: large blocks go back to the system as they are freed.
        fixed = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_ARENA_MAX": "1"}
        environment = os.environ | fixed | {"PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen(
            [sys.executable, __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        return cls(process, **json.loads(process.stdout.readline()))

    def __enter__(self) -> ServedRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def stats(self) -> dict[str, Any]:
        """Resident memory in bytes once all is idle, the longest hold of the loop since the last
        call in seconds of its thread's CPU and what held it, the machine's speed, how many objects
        were in cycles, ever, and answers by outcome."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("stats\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def unit_s() -> float:
    """This machine's speed as it is now: CPU seconds of a loop of a million turns."""
    started = time.thread_time()
    sum(range(1_000_000))
    return time.thread_time() - started


class Holds:
    """Times every callback of the loop."""

    def __init__(self) -> None:
        self.longest, self.what = 0.0, ""
        run = asyncio.events.Handle._run

        def timed(handle: Any) -> None:
            started = time.thread_time()
            run(handle)
            took = time.thread_time() - started
            if took > self.longest:
                self.longest, self.what = took, repr(handle)[:300]

        asyncio.events.Handle._run = timed  # type: ignore[method-assign]


class Collected:
    """Counts what only the garbage collector frees, ever."""

    def __init__(self) -> None:
        self.objects = 0
        gc.callbacks.append(self._heard)

    def _heard(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            self.objects += info["collected"]


async def serve(model: Path) -> None:
    from gateway_rig import start_rig, until

    from crossdock.router import garbage
    from crossdock.worker.states import States

    holds, collected = Holds(), Collected()
    loop = asyncio.get_running_loop()
    async with start_rig(model, num_blocks=BLOCKS) as rig:
        addresses = {"http": rig.gateway.http_address, "grpc": rig.gateway.grpc_address}
        garbage.settle()  # as a gateway's process does
        print(json.dumps(addresses), flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            held, what, holds.longest, holds.what = holds.longest, holds.what, 0.0, ""
            await until(lambda: rig.idle, 30)
            for worker in rig.workers:  # what the fakes remember is not the gateway's
                for kept in (worker.prefills, worker.decodes, worker.hand_offs, worker.cancels):
                    kept.clear()
                worker.kept.states = States()
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            unit = unit_s()
            await asyncio.sleep(0)  # what held the loop here is this kit's own
            holds.longest = 0.0
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            counted = next(iter(rig.gateway.metrics.requests.collect())).samples
            outcomes = {s.labels["outcome"]: s.value for s in counted if s.name.endswith("_total")}
            found = {
                "rss": pages * os.sysconf("SC_PAGE_SIZE"),
                "held_s": held,
                "unit_s": unit,
                "held_by": what,
                "garbage": collected.objects,
                "outcomes": outcomes,
                "connections": rig.metric("http_connections"),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
