"""What a decision went by, as it stood then. Decisions keep it raw, since few are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from crossdock.router.placement.prefix_index import Level, depth_at
from crossdock.router.placement.workers import WorkerView

if TYPE_CHECKING:
    from crossdock.router.placement.demand import Placement

# A worker that may compute the prompt: seconds of all, which are until token 0, of the stream where
# it goes on there to the end, and of what is evicted; the first of these; of that, until it begins
# with the prompt; the second; who it is.
Computes: TypeAlias = tuple[float, float, float, float, WorkerView]
# One that may go on from token 0: seconds of the stream, more than on the best of them; bytes to
# pull; its name.
Pull: TypeAlias = tuple[float, float, str]
Compared: TypeAlias = tuple[str, float]  # a worker and the number of it that a policy goes by


class Parts(NamedTuple):
    """Predicted seconds of a way that a sequence may go. They add up to what decides."""

    queue: float = 0.0  # until the prompts before it are computed
    prompt: float = 0.0  # what is not cached of its own
    eviction: float = 0.0  # what others will compute again, since its blocks are in the way
    transfer: float = 0.0  # its KV's way to the decode worker, which delays token 1
    stream: float = 0.0  # its decode steps, more than on the best of the decode workers

    @property
    def ttft(self) -> float:
        """Until token 0."""
        return self.queue + self.prompt


@dataclass(frozen=True)
class Candidate:
    """A worker that was weighed. `parts`: as far as they are its own; None where the policy
    predicts nothing. `all_s`: with the decode worker that suits it best; None where that could not
    matter. `number`: what a policy that predicts nothing went by."""

    worker: str
    parts: Parts | None = None
    cached_blocks: int = 0
    all_s: float | None = None
    number: float | None = None


class Predicted(NamedTuple):
    """Of a decision by predicted seconds."""

    prefills: Sequence[Computes]
    pairs: Sequence[float]  # of the first of these, with the decode worker that suits each best
    pulls: Sequence[Pull]  # who may decode after a prefill worker
    after: Sequence[float]  # of each, after the chosen one: pull and stream
    alone: Sequence[Computes]  # who may do both
    levels: Sequence[Level]  # who had how many blocks of it

    def computing(self) -> list[Candidate]:
        """Who may have computed the prompt."""
        unpaired = [None] * (len(self.prefills) - len(self.pairs))
        totals = [*self.pairs, *unpaired, *(option[0] for option in self.alone)]
        return [
            Candidate(
                option[-1].name, _parts(option), depth_at(self.levels, option[-1].slot), all_s
            )
            for option, all_s in zip([*self.prefills, *self.alone], totals)
        ]

    def decoding(self) -> list[Candidate]:
        """Who may have gone on from token 0, had the chosen prefill worker been before it."""
        return [
            Candidate(name, Parts(transfer=after_s - excess_s, stream=excess_s))
            for (excess_s, _, name), after_s in zip(self.pulls, self.after)
        ]

    def parts(self, placement: Placement) -> Parts:
        """Of the way that was chosen: their sum is the least, or a near one at random."""
        options = self.computing()
        of = {each.worker: each.parts or Parts() for each in options}
        if placement.prefill is None:
            return of[placement.decode]
        after = {each.worker: each.parts or Parts() for each in self.decoding()}
        transfer_s, stream_s = after[placement.decode][3:]
        return of[placement.prefill]._replace(transfer=transfer_s, stream=stream_s)


class ByNumber(NamedTuple):
    """Of a decision by a number of each worker: the best of them, of who may compute the prompt and
    of who may decode; nobody where each has its turn."""

    computes: Sequence[Compared]
    decodes: Sequence[Compared] = ()
    why: str = ""  # the Reason for that one of these
    before_s: float = 0.0  # until the prompt has its turn where it went

    def computing(self) -> list[Candidate]:
        """As Predicted."""
        return [Candidate(name, number=number) for name, number in self.computes]

    def decoding(self) -> list[Candidate]:
        """As Predicted."""
        return [Candidate(name, number=number) for name, number in self.decodes]

    def parts(self, placement: Placement) -> Parts:
        """Of the first token alone: nothing else is predicted."""
        return Parts(self.before_s, placement.predicted_ttft_s - self.before_s)


Weighed: TypeAlias = Predicted | ByNumber


def _parts(option: Computes) -> Parts:
    cost_s, ttft_s, queue_s, stream_s, _ = option
    return Parts(queue_s, ttft_s - queue_s, cost_s - ttft_s - stream_s, stream=stream_s)
