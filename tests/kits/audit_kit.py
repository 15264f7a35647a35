"""Audit logs that are made without a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from crossdock.router.config import AuditSettings
from crossdock.router.frontdoor.audit import AuditLog

SEED = b"s" * 32


async def make(folder: Path, count: int, rotate_mb: float = 100.0, **settings: Any) -> Path:
    """A log of so many requests."""
    given = AuditSettings(file=str(folder / "log"), rotate_mb=rotate_mb, **settings)
    log = AuditLog(given, "g", SEED, CollectorRegistry())
    log.start()
    for i in range(count):
        log.add({"id": f"r{i}", "tenant": "acme", "outcome": "ok"})
        if i % 10 == 9:
            await log._flush()
    await log.close()
    return log.path
