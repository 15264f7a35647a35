"""What each tenant has used: in a database of the node's gateways, and as metrics.

One row for each day (UTC), tenant, account and model. Each gateway adds to the rows every few
seconds, off its loop; what it has not added yet is lost with its process.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from prometheus_client import CollectorRegistry

from crossdock.proto.errors import Unavailable
from crossdock.router.dispatch.plain_metrics import PlainCounter
from crossdock.router.dispatch.request import Ended
from crossdock.router.frontdoor.limits import period_of
from crossdock.router.frontdoor.principal import Principal

log = logging.getLogger(__name__)

FLUSH_S = 2.0
LABELLED = 200  # tenants with metrics of their own; all others are one
OTHERS = "other tenants"
BUSY_S = 10.0

Row = tuple[str, str, str, str]  # day, tenant, account, model


@dataclass
class Amounts:
    """What was used. `worker_seconds` are of engines, `gpu_seconds` of their GPUs; see ended.py."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    worker_seconds: float = 0.0
    gpu_seconds: float = 0.0
    cost: float = 0.0

    def plain(self) -> dict[str, int | float]:
        """By name; the database has all of them as REAL, and what is counted is whole."""
        counts = {about.name for about in fields(self) if about.type in ("int", int)}
        return {name: int(value) if name in counts else value for name, value in vars(self).items()}

    def __iadd__(self, other: Amounts) -> Amounts:
        for about in fields(self):
            total = getattr(self, about.name) + getattr(other, about.name)
            setattr(self, about.name, total)
        return self


COLUMNS = tuple(about.name for about in fields(Amounts))
KEYS = ("day", "tenant", "account", "model")


class Usage:
    """Counts for one gateway. `file`: None keeps nothing but the metrics."""

    def __init__(
        self,
        file: Path | None,
        registry: CollectorRegistry,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._file, self._wall = file, wall
        self._new: dict[Row, Amounts] = {}  # not in the database yet
        self._labels: dict[str, str] = {}
        about = {
            "requests": "Requests that were charged, by tenant",
            "prompt_tokens": "Prompt tokens, by tenant",
            "cached_tokens": "Of those, found in a cache",
            "generated_tokens": "Tokens delivered, by tenant",
            "worker_seconds": "Seconds of workers' engines, by tenant",
            "gpu_seconds": "The same for each GPU of an engine",
            "cost": "By the prices of the YAML, in their currency",
        }
        self._counters = {
            name: PlainCounter(f"crossdock_tenant_{name}", text, registry, ("tenant", "model"))
            for name, text in about.items()
        }

    def add(self, principal: Principal, model: str, ended: Ended, cost: float) -> None:
        """A request of this model has ended."""
        charged = ended.charged
        amounts = Amounts(
            requests=1 if charged else 0,
            prompt_tokens=ended.prompt_tokens,
            cached_tokens=ended.cached_tokens,
            generated_tokens=ended.generated_tokens,
            worker_seconds=sum(sequence.worker_seconds for sequence in ended.sequences),
            gpu_seconds=sum(sequence.gpu_seconds for sequence in ended.sequences),
            cost=cost,
        )
        label = self._label(principal.tenant)
        for name, counter in self._counters.items():
            counter.inc(getattr(amounts, name), label, model)
        if self._file is not None:
            day = period_of("day", self._wall())
            row = (day, principal.tenant, principal.account, model)
            self._new.setdefault(row, Amounts()).__iadd__(amounts)

    def spent(self, account: str, since: str) -> float:
        """Cost of an account since a day, ISO; 0 where nothing is kept. Raises Unavailable."""
        mine = sum(new.cost for row, new in self._new.items() if row[2] == account)
        if self._file is None:
            return mine
        text = "SELECT coalesce(sum(cost), 0) FROM usage WHERE account = ? AND day >= ?"
        try:
            with _open(self._file) as base:
                found = base.execute(text, (account, since)).fetchone()
        except (sqlite3.Error, OSError) as error:
            log.error("%s: what %s has spent cannot be read: %s", self._file, account, error)
            raise Unavailable("what was spent cannot be read; try again later") from None
        return float(found[0]) + mine

    async def keep(self) -> None:
        """Adds to the database until it is cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Adds what is new to the database; what it does not take is tried again."""
        if self._file is None or not self._new:
            return
        new, self._new = self._new, {}
        try:
            await asyncio.to_thread(add_rows, self._file, new)
        except Exception as error:  # of the disk mostly; none of them ends the keeping in silence
            log.error("%s: usage could not be added, and is kept: %s", self._file, error)
            for row, amounts in new.items():
                self._new.setdefault(row, Amounts()).__iadd__(amounts)

    def _label(self, tenant: str) -> str:
        if tenant not in self._labels and len(self._labels) < LABELLED:
            self._labels[tenant] = tenant
        return self._labels.get(tenant, OTHERS)


def usage_file(home: Path, cluster: str) -> Path:
    """Where a cluster's gateways on this node keep what was used."""
    return home / "usage" / f"{cluster}.db"


def add_rows(file: Path, rows: Mapping[Row, Amounts]) -> None:
    """Adds to the database, which is made where it is not there. Raises sqlite3.Error, OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS)
    marks = ", ".join("?" * (len(KEYS) + len(COLUMNS)))
    text = (
        f"INSERT INTO usage VALUES ({marks}) ON CONFLICT ({', '.join(KEYS)}) DO UPDATE SET {sums}"
    )
    with _open(file) as base, base:
        base.executemany(text, [(*row, *astuple(amounts)) for row, amounts in rows.items()])


def read_usage(file: Path, since: str = "", until: str = "9999") -> dict[Row, Amounts]:
    """The rows of the days from `since` to `until`, ISO. Raises sqlite3.Error."""
    text = "SELECT * FROM usage WHERE day >= ? AND day <= ? ORDER BY day, tenant, account, model"
    with _open(file) as base:
        found = base.execute(text, (since, until)).fetchall()
    return {tuple(row[:4]): Amounts(*row[4:]) for row in found}


@contextmanager
def _open(file: Path) -> Iterator[sqlite3.Connection]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, timeout=BUSY_S)) as base:
        base.execute("PRAGMA journal_mode = WAL")
        keys, columns = (
            ", ".join(f"{k} TEXT" for k in KEYS),
            ", ".join(f"{c} REAL" for c in COLUMNS),
        )
        unique = ", ".join(KEYS)
        base.execute(
            f"CREATE TABLE IF NOT EXISTS usage ({keys}, {columns}, PRIMARY KEY ({unique}))"
        )
        yield base
