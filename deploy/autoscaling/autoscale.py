"""How many workers each pool is to have. Pure: the same for the controller and the simulator.

    observation ─> learn rate, trend, lengths ─> what each pool needs      (wants.py, sizing.py)
            └─> what was missed and what waits: the fast loop above that
    wants ─> a pool with too many gives to one that lacks (role flip) ─> bound on GPUs ─> targets

A pool grows at once and shrinks once fewer have been enough for a while, never below what the
forecast's upper band needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from crossdock.deploy.autoscaling.observation import Config, Observation, Pool
from crossdock.deploy.autoscaling.wants import Cause, Demand, Memory, Situation, Want
from crossdock.proto.settings import no_entries
from crossdock.router.dispatch.traffic import Traffic

STAY = 0.8


@dataclass(frozen=True)
class State:
    """What is remembered from decision to decision; a fresh one has everything to learn, and takes
    no worker away before it has."""

    demand: Mapping[str, Demand] = field(default_factory=no_entries)  # by model
    pools: Mapping[str, Memory] = field(default_factory=no_entries)  # by name


@dataclass(frozen=True)
class PoolDecision:
    """What was decided of one pool. Workers."""

    pool: str
    before: int
    target: int
    floor: int  # that the forecast needs; 0 where nothing is known yet
    keep: int  # below which none is taken away
    cause: Cause
    reason: str

    def __str__(self) -> str:
        return f"{self.pool} {self.before} -> {self.target}: {self.reason}"


@dataclass(frozen=True)
class Decision:
    """What was decided of every autoscaled pool."""

    pools: tuple[PoolDecision, ...]

    @property
    def targets(self) -> dict[str, int]:
        """Workers by pool."""
        return {each.pool: each.target for each in self.pools}

    @property
    def changes(self) -> list[PoolDecision]:
        """Of pools that are to have another size."""
        return [each for each in self.pools if each.target != each.before]


def autoscale(
    config: Config, state: State, seen: Observation, now: float
) -> tuple[State, Decision]:
    """One decision. `now` is any clock in seconds that all decisions of a state have in common."""
    demand = {
        model: state.demand.get(model, Demand()).observed(traffic, seen.seconds)
        for model, traffic in seen.traffic.items()
    }
    memories: dict[str, Memory] = {}
    wants: dict[str, Want] = {}
    for pool in config.pools:
        if not pool.autoscaled:
            continue
        memory = state.pools.get(pool.name, Memory()).observed(seen.pools[pool.name])
        there = replace(seen.pools[pool.name], steps=memory.steps)
        traffic = seen.traffic.get(pool.model, Traffic())
        known = demand.get(pool.model, Demand())
        given = _given(config, seen, pool)
        situation = Situation(config, pool, there, known, traffic, seen.seconds, given)
        memories[pool.name], wants[pool.name] = situation.want(memory, now)
    sizes = _Sizes(config, seen, wants)
    sizes.shift()
    sizes.fit()
    for name, target in sizes.targets.items():
        if target > seen.pools[name].target:
            memories[name] = memories[name].raised(now)
    decided = tuple(
        PoolDecision(
            name,
            seen.pools[name].target,
            target,
            wants[name].floor,
            wants[name].keep,
            sizes.causes[name],
            "; ".join([*sizes.notes.get(name, ()), wants[name].why]),
        )
        for name, target in sizes.targets.items()
    )
    return State(demand, memories), Decision(decided)


def _given(config: Config, seen: Observation, pool: Pool) -> int:
    """Workers of pools of a fixed size that share this one's work."""
    return sum(
        seen.pools[other.name].ready
        for other in config.pools
        if not other.autoscaled and (other.model, other.role) == (pool.model, pool.role)
    )


@dataclass
class _Sizes:
    """The pools' targets, from what each wants by itself to what all can have together."""

    config: Config
    seen: Observation
    wants: Mapping[str, Want]

    def __post_init__(self) -> None:
        self.pools = {pool.name: pool for pool in self.config.pools if pool.autoscaled}
        self.targets = {name: want.target for name, want in self.wants.items()}
        self.causes = {name: want.cause for name, want in self.wants.items()}
        self.notes: dict[str, list[str]] = {}

    def shift(self) -> None:
        """Where one lacks workers and an alike one has more than it keeps, they change role: that
        takes no start, and no room."""
        for name, pool in self.pools.items():
            lacks = self.targets[name] - self.seen.pools[name].target
            for other in self._alike(pool):
                spare = self.targets[other] - max(self.wants[other].keep, self.pools[other].least)
                moved = min(lacks, spare)
                if moved > 0:
                    lacks -= moved
                    self.targets[other] -= moved
                    self._note(other, Cause.FLIP, f"{moved} to {name}")
                    self._note(name, Cause.FLIP, f"{moved} from {other}")

    def fit(self) -> None:
        """Within the bound on GPUs: whoever has the most for what it needs gives up first."""
        bound = self.config.settings.gpus
        if not bound:
            return
        wanted = self._gpus()
        while self._gpus() > bound:
            over = [name for name, pool in self.pools.items() if self.targets[name] > pool.least]
            if not over:
                break
            most = max(over, key=lambda name: (self._left(name), self.targets[name], name))
            self.targets[most] -= 1
        if wanted > bound:
            for name in self.pools:
                self._note(name, Cause.GPUS, f"{wanted:g} GPUs wanted, {bound:g} allowed")

    def _left(self, name: str) -> float:
        """Of what it needs, the part that it would still have with one worker less. Who would have
        to give up one that it has counts as having less: it takes a difference to change."""
        left = (self.targets[name] - 1) / max(1, self.wants[name].floor)
        return left if self.targets[name] > self.seen.pools[name].target else STAY * left

    def _gpus(self) -> float:
        return sum(pool.gpus * self.targets[name] for name, pool in self.pools.items())

    def _alike(self, pool: Pool) -> list[str]:
        """Those that it can exchange workers with, the one with the most to spare first."""
        alike = [
            name
            for name, other in self.pools.items()
            if pool.alike and other.alike == pool.alike and name != pool.name
        ]
        return sorted(alike, key=lambda name: self.wants[name].keep - self.targets[name])

    def _note(self, name: str, cause: Cause, note: str) -> None:
        self.causes[name] = cause
        self.notes.setdefault(name, []).append(note)
