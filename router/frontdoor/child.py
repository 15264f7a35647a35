"""How the gateway's child processes end."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

ENDED_S = 10.0  # for a killed process to be gone


def end(child: subprocess.Popen[Any] | None) -> None:
    """Kills it where it still runs, waits until it is gone, and closes its pipes."""
    if child is None:
        return
    child.kill()
    child.wait(ENDED_S)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
