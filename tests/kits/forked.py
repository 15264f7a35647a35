"""Processes forked from one that has imported what they need, which spares each some seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = ["crossdock.decode.role", "crossdock.engine.native.runner", "crossdock.prefill.role"]
PRELOADED += ["crossdock.router.gateway", "crossdock.kvtransfer.registry", "nixl._api"]


def forked() -> ForkServerContext:
    """The context whose processes are forked; all kits share the one that they come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
