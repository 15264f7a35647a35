"""What this gateway believes of the workers: their loads, their caches, and what it just sent them.

A worker's load report is a little old. Work placed since then is counted on top of it until a
report arrives that can have seen it; without this a burst would go to one worker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from crossdock.proto import events
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.router.placement.prefix_index import PrefixIndex
from crossdock.router.placement.speed import (
    DEFAULT_DECODE_S,
    DEFAULT_PREFILL_S,
    PoolSpeed,
    decode_line,
    prefill_line,
)

STALE_AFTER_S = 2.5  # workers report at least once a second
STALE_AT_WORK_AFTER_S = 1.5  # and after each step where they have work
FAILED_FOR_S = 2.0  # a device that failed a step is left alone for so long while there are others
SEEN_AFTER_S = 0.05  # a report that arrives this long after a send has counted what was sent
REPLACED_WITHIN_S = 60.0  # a lost worker, as a rule: what only it can hold is not refused
MEASURED_FOR_S = 10.0  # what was measured longer ago refuses nobody
MEASURED_UP_TO = 8  # steps this many times as large as any that was measured are not known
# A sequence more costs the others of its batch this part of a step at the least, measured or not.
LEAST_SHARE = 0.005
DEFAULT_BANDWIDTH = 1e9  # bytes/s
BANDWIDTH_MEMORY = 0.8  # how much of the pulls before counts beside the newest one
FASTEST_MEMORY = 0.99  # the same, of the best pair beside the newest pull of any
# First and longest time that a pair is left alone after a failed pull; each further one doubles it.
PAIR_BACK_OFF_S = (5.0, 30.0)


LoadReport = worker_pb2.Load  # the newest that a worker sent; zeros mean not measured yet


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself when its stream opens; zeros mean that it did not say."""

    name: str
    role: Role
    incarnation: str
    num_blocks: int
    block_size: int
    block_bytes: int
    pool: str = ""
    layout_hash: bytes = b""
    context_length: int = 0  # tokens
    max_batch: int = 0  # sequences that decode at once; more wait
    chunk_tokens: int = 0  # of one prefill step at the most
    gpus: float = 0.0  # of its engine
    weights_digest: str = ""

    @cached_property
    def most_tokens(self) -> int:
        """The longest sequence that it can hold."""
        pool_tokens = self.num_blocks * self.block_size
        return min(pool_tokens, self.context_length or pool_tokens)


@dataclass
class _Unseen:
    tokens: int  # uncached prompt tokens to compute
    blocks: int
    sent_at: float | None  # None: reserved, not sent yet


class _Placed(dict[str, _Unseen]):
    """What was promised to a worker and is not in its reports yet, by key, with its totals."""

    tokens = blocks = 0

    def put(self, key: str, item: _Unseen) -> None:
        self.drop(key)
        self[key] = item
        self.tokens += item.tokens
        self.blocks += item.blocks

    def drop(self, key: str) -> None:
        item = self.pop(key, None)
        if item is not None:
            self.tokens -= item.tokens
            self.blocks -= item.blocks


@dataclass(eq=False)
class WorkerView:
    """One connected worker. Times are of the clock that the callers pass in."""

    facts: WorkerFacts
    slot: int
    reported_at: float
    measured_at: float = float("-inf")  # when its prefill speed last changed
    load: LoadReport = field(default_factory=LoadReport)
    unseen: _Placed = field(default_factory=_Placed)
    computing: dict[str, int] = field(default_factory=dict)  # prompt tokens sent, no token 0 yet
    computing_since: float = 0.0  # the first of them
    failed_at: float = float("-inf")  # its device failed a step and nothing shows why

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def role(self) -> Role:
        return self.facts.role

    @property
    def queued_tokens(self) -> int:
        return self.load.queued_tokens + self.unseen.tokens

    @property
    def sequences(self) -> int:
        return self.load.waiting + self.load.running + len(self.unseen)

    @property
    def available_blocks(self) -> int:
        reported = self.load.total_blocks > 0
        known = self.load.free_blocks + self.load.cached_blocks
        total = known if reported else self.facts.num_blocks
        return total - self.unseen.blocks

    def takes(self, tokens: int) -> bool:
        """Whether a sequence that grows to `tokens` may go there at all."""
        return not self.load.draining and tokens <= self.facts.most_tokens

    def is_stale(self, now: float) -> bool:
        """It hangs, is cut off or has a broken device, as far as can be told."""
        if now - self.failed_at < FAILED_FOR_S:
            return True
        limit_s = STALE_AT_WORK_AFTER_S if self.sequences else STALE_AFTER_S
        return self.load.late or now - self.reported_at > limit_s

    def knows_prefill(self, tokens: int, now: float) -> bool:
        """Whether it measured lately, and not on much smaller steps, how long so many tokens take:
        what may be wrong must not keep itself from being corrected."""
        step = min(tokens, self.facts.chunk_tokens or tokens)
        known = MEASURED_UP_TO * self.load.prefill_step_tokens or step
        return now - self.measured_at <= MEASURED_FOR_S and step <= known


class ClusterView:
    """Every connected worker by name, the prefix index over them, and measured link speeds."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.weights_digest = ""  # of who connected last
        self.layout_hash = b""  # of who connected last: block hashes begin with it
        self.index = PrefixIndex()
        # (prefill, decode) -> decayed sums of bytes and seconds, so that large pulls count most.
        self._pulled: dict[tuple[str, str], tuple[float, float]] = {}
        self._fastest = 0.0  # bytes/s of the best pair lately; fades with every pull
        # (prefill, decode) -> until when it backs off, and for how long; since the last good pull.
        self._back_offs: dict[tuple[str, str], tuple[float, float]] = {}
        self._prefill = defaultdict[str, PoolSpeed](lambda: PoolSpeed(DEFAULT_PREFILL_S))  # by pool
        self._decode = defaultdict[str, PoolSpeed](lambda: PoolSpeed(DEFAULT_DECODE_S))
        self._free_slots: list[int] = []
        self._gone: dict[str, WorkerView] = {}  # the last of each name that is not there now
        self._pool_tokens: int | None = None  # see pool_tokens
        self._pool_tokens_until = float("-inf")  # a change, or who is gone being given up

    # -- what the links tell ------------------------------------------------------------------

    def connected(self, facts: WorkerFacts, now: float) -> WorkerView:
        """A worker's stream opened. An older incarnation of the same name is forgotten."""
        events.emit("connected", facts.name, facts.incarnation)
        if facts.name in self.workers:
            self._forget(facts.name)
        slot = self._free_slots.pop() if self._free_slots else len(self.workers)
        self._gone.pop(facts.name, None)
        worker = WorkerView(facts, slot, now)
        self.workers[facts.name] = worker
        self._pool_tokens_until = float("-inf")
        self.layout_hash = facts.layout_hash
        self.weights_digest = facts.weights_digest
        return worker

    def disconnected(self, name: str, incarnation: str) -> None:
        """The stream is gone; another incarnation that took the name since then stays."""
        events.emit("disconnected", name, incarnation)
        worker = self.workers.get(name)
        if worker is not None and worker.facts.incarnation == incarnation:
            self._forget(name)

    def reported(self, worker: WorkerView, load: LoadReport, now: float) -> None:
        """A worker said how it stands; work placed there that it has counted is counted no more."""
        pool, prefill, decode = worker.facts.pool, prefill_line(load), decode_line(load)
        if prefill is not None and prefill != prefill_line(worker.load):
            self._prefill[pool].measured(prefill)
            worker.measured_at = now
        if decode is not None and decode != decode_line(worker.load):
            self._decode[pool].measured(decode)
        worker.load = load
        worker.reported_at = now
        if worker.unseen:
            seen = [
                key
                for key, item in worker.unseen.items()
                if item.sent_at is not None and now - load.age_s - item.sent_at >= SEEN_AFTER_S
            ]
            for key in seen:
                worker.unseen.drop(key)

    def transferred(self, prefill: str, decode: str, nbytes: int, seconds: float) -> None:
        """Folds one measured pull into the pair's bandwidth; the pair works."""
        if nbytes <= 0 or seconds <= 0 or not {prefill, decode} <= self.workers.keys():
            return
        self._back_offs.pop((prefill, decode), None)
        old_bytes, old_seconds = self._pulled.get((prefill, decode), (0.0, 0.0))
        self._pulled[prefill, decode] = (
            BANDWIDTH_MEMORY * old_bytes + nbytes,
            BANDWIDTH_MEMORY * old_seconds + seconds,
        )
        self._fastest = max(self.bandwidth(prefill, decode), FASTEST_MEMORY * self._fastest)

    def pull_failed(self, prefill: str, decode: str, now: float) -> None:
        """The link of the two may be cut, though both are well: others are taken for a while."""
        if not {prefill, decode} <= self.workers.keys():
            return  # a worker died, which says nothing of the link to its successor
        first, longest = PAIR_BACK_OFF_S
        until, back_off = self._back_offs.get((prefill, decode), (float("-inf"), 0.0))
        if now < until:
            return  # of the pulls that were under way when the first one failed
        back_off = first if now - until > longest else min(2 * back_off, longest)
        self._back_offs[prefill, decode] = (now + back_off, back_off)

    # -- what the dispatcher tells ------------------------------------------------------------

    def place(self, name: str, key: str, tokens: int, blocks: int) -> None:
        """Work was promised to a worker: it counts there from now on."""
        worker = self.workers.get(name)
        if worker is not None:
            worker.unseen.put(key, _Unseen(tokens, blocks, None))

    def sent(self, name: str, key: str, now: float) -> None:
        """The promised work was sent: the worker's own reports will count it soon."""
        worker = self.workers.get(name)
        if worker is not None and key in worker.unseen:
            worker.unseen[key].sent_at = now
            if worker.unseen[key].tokens:
                if not worker.computing:
                    worker.computing_since = now
                worker.computing[key] = worker.unseen[key].tokens

    def computed(self, name: str, key: str, now: float) -> None:
        """Token 0 came: the worker goes on with the next prompt."""
        worker = self.workers.get(name)
        if worker is not None and worker.computing.pop(key, None) is not None:
            worker.computing_since = now

    def unplace(self, name: str, key: str) -> None:
        worker = self.workers.get(name)
        if worker is not None:
            worker.unseen.drop(key)
            worker.computing.pop(key, None)

    # -- what the policies ask ----------------------------------------------------------------

    def usable(
        self, role: Role, now: float, avoid: Iterable[str] = (), tokens: int = 0
    ) -> list[WorkerView]:
        """Workers of a role that may get a sequence of `tokens`: the fresh ones not to be avoided,
        or, where there are none, whoever is left, can hold it and is not draining; of those that
        are all stale (the gateway itself was held up, say) the ones not to be avoided."""
        alive = [w for w in self.workers.values() if w.role is role and w.takes(tokens)]
        avoided = frozenset(avoid)
        fresh = [w for w in alive if not w.is_stale(now)]
        untried = [w for w in alive if w.name not in avoided]
        return [w for w in fresh if w.name not in avoided] or fresh or untried or alive

    def count(self, role: Role) -> int:
        """Connected workers of a role."""
        return sum(worker.role is role for worker in self.workers.values())

    def device_failed(self, name: str, now: float) -> None:
        """An engine step failed there, and nothing shows that a request is why."""
        if name in self.workers:
            self.workers[name].failed_at = now

    def backs_off(self, prefill: str, decode: str, now: float) -> bool:
        """Whether a pull between the two failed lately, and none succeeded since."""
        return now < self._back_offs.get((prefill, decode), (now, 0.0))[0]

    @property
    def any_backs_off(self) -> bool:
        """Cheap, and false on most days."""
        return bool(self._back_offs)

    def bandwidth(self, prefill: str, decode: str) -> float:
        """Bytes per second of pulls between the two, as measured. A pair that was not is presumed
        to be as good as the best, so that it gets its turn to be measured."""
        presumed = (self._fastest or DEFAULT_BANDWIDTH, 1.0)
        nbytes, seconds = self._pulled.get((prefill, decode), presumed)
        return nbytes / seconds

    def prefill_s(self, worker: WorkerView, tokens: int) -> float:
        """Predicted time to compute `tokens` prompt tokens, as presumed by speed.py."""
        speed, busy = self._prefill[worker.facts.pool], worker.queued_tokens > 0
        base, slope = speed.presumed(prefill_line(worker.load), busy)
        steps = -(-tokens // (worker.facts.chunk_tokens or max(1, tokens)))
        return base * steps + slope * tokens

    def drained_s(self, tokens: int) -> float:
        """Predicted time in which all workers together compute so many prompt tokens."""
        roles = (Role.PREFILL, Role.COLOCATED)
        workers = [w for w in self.workers.values() if w.role in roles]
        if not tokens or not workers:
            return 0.0
        each = -(-tokens // len(workers))
        return min(self.prefill_s(worker, each) for worker in workers)

    def step_s(self, worker: WorkerView, batch: int) -> float:
        """Predicted time of one decode step over `batch` sequences, which is their TPOT."""
        speed, busy = self._decode[worker.facts.pool], worker.sequences > 0
        base, slope = speed.presumed(decode_line(worker.load), busy)
        return base + max(slope, LEAST_SHARE * base) * batch

    @property
    def ready(self) -> bool:
        """A prompt could be taken from its first token to its last."""
        roles = {w.role for w in self.workers.values() if not w.load.draining}
        return Role.COLOCATED in roles or {Role.PREFILL, Role.DECODE} <= roles

    def pool_tokens(self, now: float) -> int | None:
        """The longest sequence that some path through the cluster can hold, also with workers that
        may be replaced yet; None: nobody known."""
        if now < self._pool_tokens_until:
            return self._pool_tokens
        gone = [w for w in self._gone.values() if now - w.reported_at < REPLACED_WITHIN_S]
        largest = dict.fromkeys(Role, 0)
        for worker in (*self.workers.values(), *gone):
            largest[worker.role] = max(largest[worker.role], worker.facts.most_tokens)
        pair = min(largest[Role.PREFILL], largest[Role.DECODE])
        self._pool_tokens = max(largest[Role.COLOCATED], pair) or None
        given_up = [worker.reported_at + REPLACED_WITHIN_S for worker in gone]
        self._pool_tokens_until = min(given_up, default=float("inf"))
        return self._pool_tokens

    # -----------------------------------------------------------------------------------------

    def _forget(self, name: str) -> None:
        worker = self._gone[name] = self.workers.pop(name)
        self._pool_tokens_until = float("-inf")
        self.index.drop(worker.slot)
        self._free_slots.append(worker.slot)
        self._pulled = {pair: v for pair, v in self._pulled.items() if name not in pair}
        self._back_offs = {pair: v for pair, v in self._back_offs.items() if name not in pair}
