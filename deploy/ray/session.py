"""Ray itself: joined or started by `crossdock up`, watched, and left."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from crossdock.proto.errors import Unavailable

LOCAL_CPUS = 1024.0  # a local Ray counts workers' cpus but never refuses one for want of them
VITAL = ("gcs_server", "raylet")  # of Ray's own processes: no cluster without them
LOOPBACK = "127.0.0.1"

_core: Any = ray._raylet
_restore = contextlib.ExitStack()  # what starting a Ray of our own has changed in this process


def start_ray(address: str, object_store_mb: int, folder: str) -> None:
    """Joins the Ray cluster at `address`, or starts one on this machine.

    `folder` is for the local one's files, and readable by this user alone: Ray makes everything
    in it open to everybody. Raises Unavailable when it can't be joined, or started.
    """
    try:
        where = {"address": address} if address else _local(object_store_mb, Path(folder))
        # Ray's workers look for modules in the folder where this is called.
        with _own_sigterm(), contextlib.chdir("/"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except Exception as error:  # Ray raises plain ones as well
        doing = f"join {address!r}" if address else "start a local Ray"
        raise Unavailable(f"ray.address: cannot {doing}: {error}") from None


def _local(object_store_mb: int, folder: Path) -> dict[str, Any]:
    """Settings of a Ray for this machine alone: it listens on the loopback, and asks everybody for
    a token that is in `folder`."""
    token = folder / "token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    _set_environment(
        {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,  # would go before the file
            "RAY_AUTH_TOKEN_PATH": str(token),
            "AUTOSCALER_METRIC_PORT": "-1",  # none: nobody scales the nodes of a local Ray
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        }
    )
    # Ray takes a loopback address for a mistake and looks for another, which it then listens
    # beside, unless it is for one node alone.
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    _restore.callback(setattr, ray_constants, "ENABLE_RAY_CLUSTER", enabled)
    ray_constants.ENABLE_RAY_CLUSTER = False
    return {
        "address": "local",
        "num_cpus": int(LOCAL_CPUS),
        "include_dashboard": False,
        "object_store_memory": object_store_mb << 20,
        "_node_ip_address": LOOPBACK,
        "_temp_dir": str(folder / "ray"),
    }


def _set_environment(wanted: Mapping[str, str | None]) -> None:
    """For Ray's processes, which inherit it, and for Ray in this one, which has read it before;
    until `stop_ray`. None: not set."""
    _restore.callback(_read_again)
    for name, value in wanted.items():
        _restore.callback(_put, name, os.environ.get(name))
        _put(name, value)
    _read_again()


def _put(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def _read_again() -> None:
    _core.Config.initialize("")
    _core.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init takes SIGTERM for itself; it is given back to who had it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def open_token() -> str:
    """The file of the token for Rays that are joined, where other users can read it; else empty."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return str(path) if path.stat().st_mode & 0o077 else ""
    except OSError:
        return ""


def stop_ray() -> None:
    """Leaves the Ray cluster; one that `start_ray` started ends."""
    ray.shutdown()
    _restore.close()


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
