"""What keeps a cluster from being as specified, in words for who waits for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from crossdock.deploy.reconcile import State

if TYPE_CHECKING:
    from crossdock.deploy.controller import Controller


def waiting_for(controller: Controller) -> list[str]:
    """One line for each thing; none where everything runs as specified."""
    if controller.converged:
        return []
    failure = controller.failure
    lines = [f"the controller's last turn failed: {failure}"] if failure else []
    now = time.monotonic()
    for pool, losses in controller.losses.items():
        if losses.start_allowed_at > now:
            pause_s = losses.start_allowed_at - losses.last
            count = f"after {losses.count} losses in a row"
            lines.append(f"{pool} pauses {pause_s:g} s before its next start, {count}")
    there = {m.name for m in controller.members}
    lines += [
        f"{name} is lost: {why}" for name, why in controller.errors.items() if name not in there
    ]
    for watched in controller.members:
        why = controller.why_not_ready(watched)
        if watched.state is not State.READY:
            lines.append(f"{watched.name} is {watched.state}" + (f": {why}" if why else ""))
        elif not controller.is_told(watched):
            lines.append(f"{watched.name} has not taken the newest membership")
    return lines
