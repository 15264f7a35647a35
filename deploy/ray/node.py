"""Which processes of this node are the cluster's, or of the Ray that carries it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from crossdock.deploy import processes


def pids_here(local: bool) -> set[int]:
    """Everything of this Ray session on this node, this process among it. `local`: and whoever
    started it. Called in an actor."""
    raylet = int(os.environ["RAY_RAYLET_PID"])
    node: Any = ray._private.worker._global_node
    roots = {raylet, os.getpid(), *_naming(node.session_name)}
    if local and (parent := processes.parent_of(raylet)) is not None:
        roots.add(parent)
    return roots | {below.pid for root in roots for below in processes.descendants(root)}


def _naming(word: str) -> set[int]:
    """Processes of this machine that have it in their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                pass  # it has ended
    return found
