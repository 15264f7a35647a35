"""Sequences for which there is no worker just now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from crossdock.proto.errors import Unavailable
from crossdock.router.dispatch.ports import Timer, Timers
from crossdock.router.dispatch.sequence import SequenceState
from crossdock.router.placement.demand import NoWorker

Step = Callable[[SequenceState], None]


@dataclass(eq=False)
class Waiting:
    """Each sequence has its next step here, to be tried when a worker appears. After `wait_s`
    seconds without one, all its tries together, it is passed to `give_up` with why."""

    timers: Timers
    wait_s: float
    give_up: Callable[[SequenceState, NoWorker], None]
    _steps: dict[SequenceState, Step] = field(default_factory=dict)
    _limits: dict[SequenceState, Timer] = field(default_factory=dict)  # also while one is tried

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._steps)

    def add(self, sequence: SequenceState, step: Step, why: Unavailable) -> None:
        """Has `step` tried when a worker appears."""
        self._steps[sequence] = step
        if sequence not in self._limits:
            error = NoWorker(f"{why} (waited {self.wait_s:g} s)")
            limit = self.timers.call_later(self.wait_s, self._over, sequence, error)
            self._limits[sequence] = limit

    def remove(self, sequence: SequenceState) -> None:
        """It has its worker, or has ended."""
        self._steps.pop(sequence, None)
        if (limit := self._limits.pop(sequence, None)) is not None:
            limit.cancel()

    def try_all(self, run: Callable[[SequenceState, Step], None]) -> None:
        """A worker came or went: `run` is called with every sequence and its step."""
        for sequence in list(self._steps):
            if (step := self._steps.pop(sequence, None)) is not None:
                run(sequence, step)

    def _over(self, sequence: SequenceState, error: NoWorker) -> None:
        del self._limits[sequence]
        if self._steps.pop(sequence, None) is not None:  # else there is one, and it waits for room
            self.give_up(sequence, error)
