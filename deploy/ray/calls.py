"""Calls of actors: how they fail, and how a process that does not answer is ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Awaitable, Iterator, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crossdock.deploy import processes
from crossdock.deploy.runtime import ProcessGone, StartFailed

T = TypeVar("T")

KILL_S = 5.0  # for Ray to notice that a process is gone
CRASHES = "CROSSDOCK_CRASHES"  # the folder where a process that crashes leaves why


async def call(reference: Awaitable[T]) -> T:
    """What an actor gives. Raises StartFailed or ProcessGone; the caller sets a timeout."""
    with _translated():
        return await reference


def get(reference: Any, timeout_s: float) -> object:
    """As `call`, blocking. Raises TimeoutError as well."""
    with _translated():
        return ray.get(reference, timeout=timeout_s)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's errors as StartFailed, ProcessGone and TimeoutError."""
    try:
        yield
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError("no answer in time") from None
    except RayActorError as error:
        raise ProcessGone(_end_of(error)) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, StartFailed):
            raise type(cause)(str(cause)) from None
        raise StartFailed(f"{type(cause).__name__}: {cause}") from None
    except RayError as error:  # out of memory, unschedulable, broken environment
        raise ProcessGone(str(error)) from None


def _end_of(error: RayActorError) -> str:
    """The part of Ray's message that says how the process ended."""
    text = " ".join(str(error).split())
    died = re.search(r"exit type: (\w+) .*?exit detail: (.*?)\.?( Some common causes|$)", text)
    if died:
        pid = re.search(r"\bpid: (\d+)", text) if "connection error" in died[2] else None
        by = processes.end_of(int(pid[1]), os.environ.get(CRASHES, "")) if pid else ""
        return f"its process died ({by or f'{died[1]}: {died[2]}'})"
    because = re.search(r"The actor is dead because (.*)", text)
    return because[1] if because else text[:300]


def kill_process(actor: Any) -> None:
    """SIGKILL to an actor's process, on whichever node: one that hangs does not hear ray.kill,
    after which Ray takes it for dead all the same. Blocks for up to KILL_S."""
    entry: Mapping[str, Any] = {}
    with contextlib.suppress(RayError):
        entry = ray._private.state.actors(actor._actor_id.hex())
    if entry.get("State") != "ALIVE":
        return
    pid, node = entry["Pid"], entry["Address"]["NodeID"]
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
    else:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        killed = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(pid)
        ray.wait([killed], timeout=KILL_S)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
