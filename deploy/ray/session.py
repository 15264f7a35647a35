"""Ray itself: joined or started by `crossdock up`, watched, and left."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray

from crossdock.proto.errors import Unavailable

LOCAL_CPUS = 1024.0  # a local Ray counts workers' cpus but never refuses one for want of them
VITAL = ("gcs_server", "raylet")  # of Ray's own processes: no cluster without them


def start_ray(address: str, object_store_mb: int, temp_dir: str) -> None:
    """Joins the Ray cluster at `address`, or starts one on this machine under `temp_dir`.

    Raises Unavailable when it can't be joined, or can't write to the home folder.
    """
    local: dict[str, Any] = {
        "num_cpus": int(LOCAL_CPUS),
        "include_dashboard": False,
        "object_store_memory": object_store_mb << 20,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": temp_dir,
    }
    where = {"address": address} if address else {"address": "local", **local}
    try:
        with _own_sigterm():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, RuntimeError, ValueError) as error:
        doing = f"join {address!r}" if address else "start a local Ray"
        raise Unavailable(f"ray.address: cannot {doing}: {error}") from None
    except OSError as error:
        hint = "it keeps its token in ~/.ray: set HOME to a folder that can be written"
        raise Unavailable(f"Ray cannot start: {error}; {hint}") from None


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init takes SIGTERM for itself; it is given back to who had it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def stop_ray() -> None:
    """Leaves the Ray cluster; one that `start_ray` started ends."""
    ray.shutdown()


def lost_ray_process() -> str:
    """Which vital process of our own Ray has ended, and how; empty while none has."""
    node = ray._private.worker._global_node
    dead: list[tuple[str, Any]] = node.dead_processes() if node is not None else []
    for kind, process in dead:
        if kind in VITAL:
            code: int = process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"Ray's {kind} ended ({how})"
    return ""
