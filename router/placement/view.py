"""What this gateway believes of the workers, and of what lies between them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterator

from crossdock.proto import events
from crossdock.proto.steps import attention
from crossdock.proto.types import Role
from crossdock.router.placement.busy import MANY, Busy, busy
from crossdock.router.placement.columns import Columns
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.lengths import Lengths
from crossdock.router.placement.pairs import Pairs
from crossdock.router.placement.prefix_index import PrefixIndex
from crossdock.router.placement.speed import DEFAULT_PREFILL, PoolSpeeds
from crossdock.router.placement.workers import (
    ANY_CHUNK,
    LoadReport,
    Placed,
    WorkerFacts,
    WorkerView,
)

WEIGHED = 16  # workers, for how long a prompt takes at the least: those that have the most of it
SHARED_FOR_S = 10.0  # after what another gateway sent: it may send more
BUSY_FOR_S = 0.01  # what was found of all stays so, if nobody changes but by time
REPLACED_WITHIN_S = 60.0  # a lost worker, as a rule: what only it can hold is not refused


class ClusterView:
    """Every connected worker by name, the prefix index over them, and measured link speeds."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.weights_digest = ""  # of who connected last
        self.layout_hash = b""  # of who connected last: block hashes begin with it
        self.index = PrefixIndex()
        self.lengths = Lengths()
        self.token_s = DEFAULT_PREFILL.slope  # of a prompt token, as who reported last has it
        self.pairs = Pairs()
        self.shared_until = float("-inf")  # other gateways send work to these workers
        self._columns = {role: Columns() for role in Role}
        self._touched: set[WorkerView] = set()  # whose columns are not written yet
        self._speeds = defaultdict[str, PoolSpeeds](PoolSpeeds)  # by pool
        self._free_slots: list[int] = []
        self._by_slot: dict[int, WorkerView] = {}
        self._gone: dict[str, WorkerView] = {}  # the last of each name that is not there now
        self._pool_tokens: int | None = None  # see pool_tokens
        self._pool_tokens_until = float("-inf")  # a change, or who is gone being given up
        self._busy: Busy | None = None  # see busy; None: somebody has changed
        self._busy_until = float("-inf")

    # -- what the links tell ------------------------------------------------------------------

    def connected(self, facts: WorkerFacts, now: float) -> WorkerView:
        """A worker's stream opened. An older incarnation of the same name is forgotten."""
        events.emit("connected", facts.name, facts.incarnation)
        if facts.name in self.workers:
            self._forget(facts.name)
        slot = self._free_slots.pop() if self._free_slots else len(self.workers)
        self._gone.pop(facts.name, None)
        self._gone = {name: worker for name, worker in self._gone.items() if _awaited(worker, now)}
        worker = WorkerView(facts, slot, self._speeds[facts.pool], now)
        self.workers[facts.name] = self._by_slot[slot] = worker
        self._columns[facts.role].add(worker)
        self._pool_tokens_until, self._busy = float("-inf"), None
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
        worker.reported(load, now)
        if self.workers.get(worker.facts.name) is worker:  # else its stream is about to end
            self._put(worker)
        if worker.speeds.renew(now):
            self._presume(worker.speeds)
        if worker.role is not Role.DECODE:
            self.token_s = worker.speeds.prefill.line.slope

    def transferred(self, prefill: str, decode: str, nbytes: int, seconds: float) -> None:
        """A pull between the two was measured."""
        if {prefill, decode} <= self.workers.keys():
            self.pairs.transferred(prefill, decode, nbytes, seconds)

    def pull_failed(self, prefill: str, decode: str, now: float) -> None:
        """A pull between the two failed. Of a worker that died it says nothing of its successor."""
        if {prefill, decode} <= self.workers.keys():
            self.pairs.failed(prefill, decode, now)

    # -- what the dispatcher tells ------------------------------------------------------------

    def place(
        self,
        name: str,
        key: str,
        tokens: int,
        blocks: int,
        cached: int = 0,
        context: int = 0,
        yields: int = 0,
    ) -> None:
        """Work was promised to a worker: it counts there from now on. `tokens`: of a prompt, to
        compute after `cached` ones, and that it `yields`; `context`: of a stream that joins."""
        worker = self.workers.get(name)
        if worker is not None:
            attended = attention(cached, tokens, worker.facts.chunk_tokens or ANY_CHUNK)
            worker.unseen.put(key, Placed(tokens, blocks, attended, context, yields))
            self._touch(worker)

    def placed_elsewhere(
        self, name: str, key: str, num_tokens: int, uncached: int, yields: int, now: float
    ) -> None:
        """Another gateway has sent a prompt of so many tokens there, `uncached` to be computed."""
        self.shared_until = now + SHARED_FOR_S
        worker = self.workers.get(name)
        if worker is not None:
            size = max(1, worker.facts.block_size)
            uncached = min(uncached, num_tokens)
            blocks = (num_tokens + size) // size
            self.place(name, key, uncached, blocks, num_tokens - uncached, yields=yields)
            self.sent(name, key, now)

    def sent(self, name: str, key: str, now: float) -> None:
        """The promised work was sent: the worker's own reports will count it soon."""
        worker = self.workers.get(name)
        if worker is not None and key in worker.unseen:
            worker.unseen[key].sent_at = now
            if worker.unseen[key].tokens:
                if not worker.computing:
                    worker.computing_since = now
                worker.computing[key] = worker.unseen[key]

    def computed(self, name: str, key: str, now: float) -> None:
        """Token 0 came: the worker goes on with the next prompt. Its report beside that token has
        counted the sequence, however lately it was sent."""
        worker = self.workers.get(name)
        if worker is not None and worker.computing.pop(key, None) is not None:
            worker.computing_since = now
            self._seen(worker, key)

    def ended(self, decode: str, tenant: str, prompt_tokens: int, generated: int) -> None:
        """A completion ended there, having so many tokens."""
        self.lengths.ended(tenant, prompt_tokens, generated)
        if decode in self.workers:
            self.workers[decode].speeds.ended = self.lengths.mean

    def unplace(self, name: str, key: str) -> None:
        worker = self.workers.get(name)
        if worker is not None:
            worker.computing.pop(key, None)
            self._seen(worker, key)

    # -- what the policies ask ----------------------------------------------------------------

    def columns(self, role: Role) -> Columns:
        """The workers of a role as arrays, as they are now."""
        for worker in self._touched:
            self._columns[worker.role].put(worker)
        self._touched.clear()
        return self._columns[role]

    def usable(
        self, role: Role, now: float, avoid: Collection[str] = (), tokens: int = 0
    ) -> list[WorkerView]:
        """Workers of a role that may get a sequence of `tokens`: the fresh ones not to be avoided,
        or, where there are none, whoever is left, can hold it and is not draining; of those that
        are all stale (the gateway itself was held up, say) the ones not to be avoided."""
        alive = [w for w in self._columns[role].workers if tokens <= w.numbers.most_tokens]
        fresh = [worker for worker in alive if not worker.is_stale(now)]
        if not avoid:
            return fresh or alive
        untried = [w for w in alive if w.name not in avoid]
        return [w for w in fresh if w.name not in avoid] or fresh or untried or alive

    def some_usable(self, role: Role, now: float) -> Iterator[WorkerView]:
        """The same for a sequence of one token, one after the other as they are asked for."""
        stale, any_fresh = [], False
        for worker in self._columns[role].workers:
            if worker.numbers.most_tokens < 1:
                continue
            if worker.is_stale(now):
                stale.append(worker)
            else:
                any_fresh = True
                yield worker
        if not any_fresh:
            yield from stale

    @property
    def num_slots(self) -> int:
        """Of the prefix index: a worker's is below that."""
        return len(self.workers) + len(self._free_slots)

    def count(self, role: Role) -> int:
        """Connected workers of a role."""
        return len(self._columns[role])

    def device_failed(self, name: str, now: float) -> None:
        """An engine step failed there, and nothing shows that a request is why."""
        worker = self.workers.get(name)
        if worker is not None:
            worker.failed_at = now
            self._touch(worker)

    def alone_s(self, demand: Demand) -> tuple[float, int]:
        """Predicted seconds until its first token if nothing else were to be computed, where most
        of it is cached; and how many workers compute prompts."""
        depths = self.index.depths(demand.block_hashes)
        sides = (self._columns[Role.PREFILL], self._columns[Role.COLOCATED])
        workers = [worker for side in sides for worker in side.workers[:WEIGHED]]
        holders = (slot for slot in depths if self._by_slot[slot].role is not Role.DECODE)
        deepest = heapq.nlargest(WEIGHED, holders, key=depths.__getitem__)
        workers += [self._by_slot[slot] for slot in deepest]
        seconds = []
        for worker in workers:
            uncached = demand.uncached(depths.get(worker.slot, 0))
            seconds.append(worker.prompt_s(demand.num_tokens - uncached, uncached))
        return min(seconds, default=0.0), sum(len(side) for side in sides)

    def knows_prefill(self, tokens: float, now: float) -> bool:
        """Whether some worker measured lately how long so many tokens take."""
        sides = (self._columns[Role.PREFILL], self._columns[Role.COLOCATED])
        return any(worker.knows_prefill(tokens, now) for side in sides for worker in side.workers)

    def busy(self, now: float) -> Busy:
        """How the workers that compute prompts stand."""
        if self._busy is None or now >= self._busy_until:
            columns = self.columns if len(self.workers) >= MANY else self._columns.__getitem__
            sides = [columns(role) for role in (Role.PREFILL, Role.COLOCATED)]
            self._busy, self._busy_until = busy(sides, now), now + BUSY_FOR_S
        return self._busy

    @property
    def ready(self) -> bool:
        """A prompt could be taken from its first token to its last."""
        prefill, decode, colocated = (
            any(not worker.load.draining for worker in self._columns[role].workers)
            for role in (Role.PREFILL, Role.DECODE, Role.COLOCATED)
        )
        return colocated or (prefill and decode)

    def pool_tokens(self, now: float) -> int | None:
        """The longest sequence that some path through the cluster can hold, also with workers that
        may be replaced yet; None: nobody known."""
        if now < self._pool_tokens_until:
            return self._pool_tokens
        gone = [worker for worker in self._gone.values() if _awaited(worker, now)]
        largest = dict.fromkeys(Role, 0)
        for worker in (*self.workers.values(), *gone):
            largest[worker.role] = max(largest[worker.role], worker.facts.most_tokens)
        pair = min(largest[Role.PREFILL], largest[Role.DECODE])
        self._pool_tokens = max(largest[Role.COLOCATED], pair) or None
        given_up = [worker.reported_at + REPLACED_WITHIN_S for worker in gone]
        self._pool_tokens_until = min(given_up, default=float("inf"))
        return self._pool_tokens

    # -----------------------------------------------------------------------------------------

    def _seen(self, worker: WorkerView, key: str) -> None:
        if key in worker.unseen:
            worker.unseen.drop(key)
            self._touch(worker)

    def _touch(self, worker: WorkerView) -> None:
        worker.changed()
        self._put(worker)

    def _presume(self, speeds: PoolSpeeds) -> None:
        """What is presumed of a pool's workers has changed: at once for all of them."""
        self._busy = None
        for worker in self.workers.values():
            if worker.speeds is speeds:
                worker.changed()
        for columns in self._columns.values():
            columns.presume(speeds)

    def _put(self, worker: WorkerView) -> None:
        """Few workers are looked at one by one: their columns can wait until they are asked for."""
        self._busy = None
        if len(self.workers) >= MANY:
            self._columns[worker.role].put(worker)
        else:
            self._touched.add(worker)

    def _forget(self, name: str) -> None:
        worker = self._gone[name] = self.workers.pop(name)
        self._pool_tokens_until, self._busy = float("-inf"), None
        self._columns[worker.role].remove(worker)
        self._touched.discard(worker)
        self.index.drop(worker.slot)
        self.pairs.forget(name)
        del self._by_slot[worker.slot]
        self._free_slots.append(worker.slot)


def _awaited(gone: WorkerView, now: float) -> bool:
    """Whether its replacement is."""
    return now - gone.reported_at < REPLACED_WITHIN_S
