"""What a sequence asks of a cluster, and what is decided for it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from crossdock.proto.errors import Unavailable
from crossdock.proto.types import Role
from crossdock.router.placement.weighed import Weighed
from crossdock.router.placement.workers import WorkerView

OUTPUT_TOKENS = 100.0  # of a completion of which nothing is known


class NoWorker(Unavailable):
    """No worker of a role that the request needs is connected and taking work."""


@dataclass(frozen=True)
class Demand:
    """What a sequence asks of the cluster."""

    num_tokens: int  # whose KV it needs: the prompt, and after a restart what was generated
    block_hashes: Sequence[bytes]
    block_size: int
    most_tokens: int = 0  # that it may grow to, prompt and completion; 0: one more than it has
    avoid: frozenset[str] = frozenset()  # workers that just failed it; used only if nobody else is
    local_tokens: int = 0  # that a decode worker which has all before them may compute itself
    output: float = OUTPUT_TOKENS  # tokens that it is expected to draw
    tpot_s: float = float("inf")  # that streams aim at
    yields: int = 0  # see Yields
    answered_by: str = ""  # worker that may have a part of a block more than is known

    @property
    def held(self) -> dict[Role, int]:
        """Tokens that a worker of each role must be able to hold: to the end, or to token 0."""
        most = max(self.most_tokens, self.num_tokens + 1)
        first = min(most, self.num_tokens + 2)  # full with token 0, it would end the stream there
        return {Role.PREFILL: first, Role.DECODE: most, Role.COLOCATED: most}

    @property
    def blocks(self) -> int:
        """Blocks it holds once the next token is written."""
        return (self.num_tokens + self.block_size) // self.block_size

    @property
    def mean_context(self) -> float:
        """Tokens of its context on the average of its steps."""
        return self.num_tokens + self.output / 2

    def pulled(self, depth: int) -> int:
        """Blocks that a decode worker reads where so many are cached."""
        return max(0, -(-self.num_tokens // self.block_size) - depth)

    def uncached(self, depth: int) -> int:
        """Tokens to compute where so many blocks are cached. The last prompt token is always
        computed: its logits are what token 0 is drawn from."""
        return max(1, self.num_tokens - depth * self.block_size)


class Reason(enum.StrEnum):
    """Why the worker that computes the prompt was chosen; as spans and logs have it."""

    IN_TURN = "in_turn"
    LEAST_LOADED = "least_loaded"
    LONGEST_PREFIX = "longest_prefix"
    SHORT_PREFIX = "short_prefix"  # nobody has enough of it: the least loaded
    IMBALANCED = "imbalanced"  # loads are too far apart: the least loaded, whatever is cached
    LEAST_COST = "least_cost"
    SAMPLED_COST = "sampled_cost"  # not the least: the dice fell so
    QUICKEST_PAIR = "quickest_pair"
    QUICKEST_LOCAL = "quickest_local"  # a decode worker that has most of the prompt
    QUICKEST_COLOCATED = "quickest_colocated"


@dataclass(frozen=True)
class Placement:
    """The workers of one sequence; `prefill` is None where the decode worker does both phases."""

    prefill: str | None
    decode: str
    cached_blocks: int  # on the worker that computes the prompt, as far as the view knows
    uncached_tokens: int
    predicted_ttft_s: float
    measured: bool  # the prediction rests on what its worker measured lately of such prompts
    reason: Reason | None = None
    weighed: Weighed | None = field(default=None, compare=False, repr=False)

    @classmethod
    def on(
        cls,
        worker: WorkerView,
        decode: WorkerView | None,
        demand: Demand,
        now: float,
        depth: int,
        ttft_s: float,
        reason: Reason,
        weighed: Weighed | None = None,
    ) -> Placement:
        """`worker`, which holds `depth` blocks, computes the prompt; `decode`: None where it goes
        on to the end."""
        uncached = demand.uncached(depth)
        return cls(
            prefill=worker.name if decode else None,
            decode=(decode or worker).name,
            cached_blocks=depth,
            uncached_tokens=uncached,
            predicted_ttft_s=ttft_s,
            measured=worker.knows_prefill(worker.queued_tokens + uncached, now),
            reason=reason,
            weighed=weighed,
        )


UNPLACED = Placement("", "", 0, 0, 0.0, measured=False)
