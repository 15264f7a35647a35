"""Settings of UCX: what Crossdock changes of its defaults, and how a process is given them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# A link that dies without a word ends every transfer over it within about 10 s, TCP's own patience
# would be a quarter of an hour: what was sent and not acknowledged (USER_TIMEOUT), what is awaited
# (KEEP*), and connecting (SYN_CNT; NB, or the one thread that calls UCX would stand still for it).
# RDMA's own timeouts are of that order already.
DEFAULTS: Mapping[str, str] = {
    "TCP_USER_TIMEOUT": "10s",
    "TCP_KEEPIDLE": "4s",
    "TCP_KEEPINTVL": "2s",
    "TCP_KEEPCNT": "3",
    "TCP_SYN_CNT": "3",
    "TCP_CONN_NB": "y",
}


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """UCX takes its settings from the environment, when an agent is made. `settings`, without the
    prefix, go before what the environment says, that before DEFAULTS."""
    wanted = {f"UCX_{name}": str(value) for name, value in settings.items()}
    for name, value in DEFAULTS.items():
        wanted.setdefault(f"UCX_{name}", os.environ.get(f"UCX_{name}", value))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old
