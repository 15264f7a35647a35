"""What this gateway believes of the workers: their loads, their caches, and what it just sent them.

A worker's load report is a little old. Work placed since then is counted on top of it until a
report arrives that can have seen it; without this a burst would go to one worker.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from crossdock.proto.types import Role
from crossdock.router.placement.prefix_index import PrefixIndex
from crossdock.router.placement.speed import DEFAULT_PREFILL_TOKENS_PER_S, DEFAULT_STEP_S, PoolSpeed

STALE_AFTER_S = 3.0  # workers report at least once a second
SEEN_AFTER_S = 0.05  # a report that arrives this long after a send has counted what was sent
DEFAULT_BANDWIDTH = 1e9  # bytes/s
BANDWIDTH_MEMORY = 0.8  # how much of the pulls before counts beside the newest one
# First and longest time that a pair is left alone after a failed pull; each further one doubles it.
PAIR_REST_S = (5.0, 30.0)


@dataclass(frozen=True)
class LoadReport:
    """The newest load that a worker reported; zeros mean not measured yet."""

    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    step_base_s: float = 0.0
    step_per_sequence_s: float = 0.0
    draining: bool = False

    @property
    def step_s(self) -> tuple[float, float] | None:
        """Base and slope of a decode step's time; None where nothing was measured."""
        line = (self.step_base_s, self.step_per_sequence_s)
        return line if any(line) else None


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself when its stream opens."""

    name: str
    role: Role
    incarnation: str
    num_blocks: int
    block_size: int
    block_bytes: int
    pool: str = ""
    layout_hash: bytes = b""


@dataclass
class _Unseen:
    tokens: int  # uncached prompt tokens to compute
    blocks: int
    sent_at: float | None  # None: reserved, not sent yet


@dataclass(eq=False)
class WorkerView:
    """One connected worker. Times are of the clock that the callers pass in."""

    facts: WorkerFacts
    slot: int
    reported_at: float
    load: LoadReport = field(default_factory=LoadReport)
    unseen: dict[str, _Unseen] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def role(self) -> Role:
        return self.facts.role

    @property
    def queued_tokens(self) -> int:
        return self.load.queued_tokens + sum(item.tokens for item in self.unseen.values())

    @property
    def sequences(self) -> int:
        return self.load.waiting + self.load.running + len(self.unseen)

    @property
    def available_blocks(self) -> int:
        reported = self.load.total_blocks > 0
        known = self.load.free_blocks + self.load.cached_blocks
        total = known if reported else self.facts.num_blocks
        return total - sum(item.blocks for item in self.unseen.values())

    def is_stale(self, now: float) -> bool:
        return now - self.reported_at > STALE_AFTER_S


class ClusterView:
    """Every connected worker by name, the prefix index over them, and measured link speeds."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.layout_hash = b""  # of most of the workers: what block hashes start from
        self.index = PrefixIndex()
        # (prefill, decode) -> decayed sums of bytes and seconds, so that large pulls count most.
        self._pulled: dict[tuple[str, str], tuple[float, float]] = {}
        # (prefill, decode) -> until when it rests, and how long that is; since the last good pull.
        self._rests: dict[tuple[str, str], tuple[float, float]] = {}
        self._speeds: dict[str, PoolSpeed] = defaultdict(PoolSpeed)  # by pool
        self._free_slots: list[int] = []

    # -- what the links tell ------------------------------------------------------------------

    def connected(self, facts: WorkerFacts, now: float) -> WorkerView:
        """A worker's stream opened. An older incarnation of the same name is forgotten."""
        if facts.name in self.workers:
            self._forget(facts.name)
        slot = self._free_slots.pop() if self._free_slots else len(self.workers)
        worker = WorkerView(facts, slot, now)
        self.workers[facts.name] = worker
        self._count_layouts()
        return worker

    def disconnected(self, name: str, incarnation: str) -> None:
        """The stream is gone; another incarnation that took the name since then stays."""
        worker = self.workers.get(name)
        if worker is not None and worker.facts.incarnation == incarnation:
            self._forget(name)

    def reported(self, worker: WorkerView, load: LoadReport, now: float) -> None:
        speed = self._speeds[worker.facts.pool]
        if load.prefill_tokens_per_s not in (0.0, worker.load.prefill_tokens_per_s):
            speed.prefill_measured(load.prefill_tokens_per_s)
        if load.step_s not in (None, worker.load.step_s):
            speed.step_measured(load.step_base_s, load.step_per_sequence_s)
        worker.load = load
        worker.reported_at = now
        if worker.unseen:
            seen = [
                key
                for key, item in worker.unseen.items()
                if item.sent_at is not None and now - item.sent_at >= SEEN_AFTER_S
            ]
            for key in seen:
                del worker.unseen[key]

    def transferred(self, prefill: str, decode: str, nbytes: int, seconds: float) -> None:
        """Folds one measured pull into the pair's bandwidth; the pair works."""
        if nbytes <= 0 or seconds <= 0 or not self._connected(prefill, decode):
            return
        self._rests.pop((prefill, decode), None)
        old_bytes, old_seconds = self._pulled.get((prefill, decode), (0.0, 0.0))
        self._pulled[prefill, decode] = (
            BANDWIDTH_MEMORY * old_bytes + nbytes,
            BANDWIDTH_MEMORY * old_seconds + seconds,
        )

    def pull_failed(self, prefill: str, decode: str, now: float) -> None:
        """The link of the two may be cut, though both are well: others are taken for a while."""
        if not self._connected(prefill, decode):
            return  # a worker died, which says nothing of the link to its successor
        first, longest = PAIR_REST_S
        until, rest = self._rests.get((prefill, decode), (float("-inf"), 0.0))
        if now < until:
            return  # of the pulls that were under way when the first one failed
        rest = first if now - until > longest else min(2 * rest, longest)
        self._rests[prefill, decode] = (now + rest, rest)

    # -- what the dispatcher tells ------------------------------------------------------------

    def place(self, name: str, key: str, tokens: int, blocks: int) -> None:
        """Work was promised to a worker: it counts there from now on."""
        worker = self.workers.get(name)
        if worker is not None:
            worker.unseen[key] = _Unseen(tokens, blocks, None)

    def sent(self, name: str, key: str, now: float) -> None:
        """The promised work was sent: the worker's own reports will count it soon."""
        worker = self.workers.get(name)
        if worker is not None and key in worker.unseen:
            worker.unseen[key].sent_at = now

    def unplace(self, name: str, key: str) -> None:
        worker = self.workers.get(name)
        if worker is not None:
            worker.unseen.pop(key, None)

    # -- what the policies ask ----------------------------------------------------------------

    def usable(self, role: Role, now: float, avoid: Iterable[str] = ()) -> list[WorkerView]:
        """Workers of a role that may get work: the fresh ones not to be avoided, or, where there
        are none, whoever is left and not draining."""
        alive = [w for w in self.workers.values() if w.role is role and not w.load.draining]
        avoided = frozenset(avoid)
        preferred = [w for w in alive if w.name not in avoided and not w.is_stale(now)]
        return preferred or [w for w in alive if not w.is_stale(now)] or alive

    def resting(self, prefill: str, decode: str, now: float) -> bool:
        """Whether a pull between the two failed lately, and none succeeded since."""
        return now < self._rests.get((prefill, decode), (now, 0.0))[0]

    @property
    def any_resting(self) -> bool:
        """Cheap, and false on most days."""
        return bool(self._rests)

    def bandwidth(self, prefill: str, decode: str) -> float:
        """Bytes per second of pulls between the two, as measured or by default."""
        nbytes, seconds = self._pulled.get((prefill, decode), (DEFAULT_BANDWIDTH, 1.0))
        return nbytes / seconds

    def prefill_rate(self, worker: WorkerView) -> float:
        """Prompt tokens per second, as presumed by speed.py."""
        own = worker.load.prefill_tokens_per_s
        if own and worker.queued_tokens:
            return own
        of_pool = self._speeds[worker.facts.pool].prefill_tokens_per_s
        return of_pool or own or DEFAULT_PREFILL_TOKENS_PER_S

    def step_s(self, worker: WorkerView, batch: int) -> float:
        """Predicted time of one decode step over `batch` sequences, which is their TPOT."""
        own = worker.load.step_s
        presumed = own if worker.sequences else None
        presumed = presumed or self._speeds[worker.facts.pool].step_s or own or DEFAULT_STEP_S
        return presumed[0] + presumed[1] * batch

    @property
    def ready(self) -> bool:
        """A prompt could be taken from its first token to its last."""
        roles = {w.role for w in self.workers.values() if not w.load.draining}
        return Role.COLOCATED in roles or {Role.PREFILL, Role.DECODE} <= roles

    @property
    def pool_tokens(self) -> int | None:
        """The longest sequence that some path through the cluster can hold; None: nobody known."""
        largest: dict[Role, int] = {}
        for worker in self.workers.values():
            tokens = worker.facts.num_blocks * worker.facts.block_size
            largest[worker.role] = max(largest.get(worker.role, 0), tokens)
        paths = []
        if Role.COLOCATED in largest:
            paths.append(largest[Role.COLOCATED])
        if Role.PREFILL in largest and Role.DECODE in largest:
            paths.append(min(largest[Role.PREFILL], largest[Role.DECODE]))
        return max(paths) if paths else None

    # -----------------------------------------------------------------------------------------

    def _connected(self, *names: str) -> bool:
        return all(name in self.workers for name in names)

    def _count_layouts(self) -> None:
        # Nobody is connected for a moment: what was hashed meanwhile should still be found.
        counts = Counter(worker.facts.layout_hash for worker in self.workers.values())
        most = max(counts, key=lambda layout: (counts[layout], layout), default=self.layout_hash)
        self.layout_hash = most

    def _forget(self, name: str) -> None:
        worker = self.workers.pop(name)
        self._count_layouts()
        self.index.drop(worker.slot)
        self._free_slots.append(worker.slot)
        self._pulled = {pair: v for pair, v in self._pulled.items() if name not in pair}
        self._rests = {pair: v for pair, v in self._rests.items() if name not in pair}
