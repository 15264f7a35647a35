"""The policies by name: who serves a request. Pure; the clock and the dice are passed in."""

# ruff: noqa: RUF009  (setting() is dataclasses.field with documentation)
from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from crossdock.proto.settings import setting
from crossdock.router.placement.demand import Demand, Placement
from crossdock.router.placement.latency import predicted_latency
from crossdock.router.placement.peers import (
    KvCost,
    PrefixThreshold,
    least_loaded,
    round_robin,
)
from crossdock.router.placement.view import ClusterView

OURS = "predicted_latency"
ALIASES = {"least_latency": OURS}  # older name -> name


class Policy(Protocol):
    """Chooses the workers of one sequence. It keeps nothing between calls and changes nothing: the
    same arguments, with dice in the same state, give the same placement."""

    def __call__(
        self, view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
    ) -> Placement:
        """Where the sequence goes, and why. `now`: seconds on the clock of the view's reports;
        `turn`: decisions that were acted on, this one among them. Raises NoWorker where nobody can
        have it."""


@dataclass(frozen=True)
class Policies:
    """The YAML's `policies` of a gateway: the numbers of those that have some."""

    prefix_threshold: PrefixThreshold = setting(
        factory=PrefixThreshold, doc="Of the policy prefix_threshold."
    )
    kv_cost: KvCost = setting(factory=KvCost, doc="Of the policy kv_cost.")

    @property
    def by_name(self) -> dict[str, Policy]:
        """All there are; ALIASES has other names of them."""
        return {
            OURS: predicted_latency,
            "round_robin": round_robin,
            "least_loaded": least_loaded,
            "prefix_threshold": self.prefix_threshold,
            "kv_cost": self.kv_cost,
        }

    def named(self, name: str) -> Policy:
        """The policy of that name, or alias. Raises KeyError."""
        return self.by_name[ALIASES.get(name, name)]


POLICIES = tuple(Policies().by_name)  # their names
# Under these, who waits at a gateway goes by what can still be met of the SLO; else in order.
ORDERED_BY_SLO = frozenset({"predicted_latency"})
