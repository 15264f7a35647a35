"""Crossdock: a disaggregated prefill/decode serving cluster for large language models.

from crossdock import Client

with Client("127.0.0.1:50051") as client:
    print(client.generate("Once upon a time", max_tokens=32, temperature=0).text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossdock.client import AsyncClient, Client, Tls
    from crossdock.proto.errors import CrossdockError
    from crossdock.proto.types import SamplingParams
    from crossdock.results import Chunk, Result

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Chunk", "Client", "CrossdockError", "Result", "SamplingParams", "Tls"]

# Imported at first use: every part of Crossdock is under this package, and most need no client.
_HOME = {
    "AsyncClient": "crossdock.client",
    "Chunk": "crossdock.results",
    "Client": "crossdock.client",
    "CrossdockError": "crossdock.proto.errors",
    "Result": "crossdock.results",
    "SamplingParams": "crossdock.proto.types",
    "Tls": "crossdock.client",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'crossdock' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
