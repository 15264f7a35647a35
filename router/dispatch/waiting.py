"""Sequences for which there is no worker just now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from crossdock.proto.errors import Unavailable
from crossdock.router.dispatch.ports import Timers
from crossdock.router.dispatch.sequence import SequenceState
from crossdock.router.placement.demand import NoWorker

Step = Callable[[SequenceState], None]


@dataclass(eq=False)
class Waiting:
    """Each sequence has its next step here, to be tried when a worker appears. After `wait_s`
    seconds, all its tries together, it is passed to `give_up` with why."""

    timers: Timers
    wait_s: float
    give_up: Callable[[SequenceState, NoWorker], None]
    _steps: dict[SequenceState, Step] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._steps)

    def add(self, sequence: SequenceState, step: Step, why: Unavailable) -> None:
        """Has `step` tried when a worker appears; the sequence's timer is the wait's until then."""
        self._steps[sequence] = step
        if sequence.timer is None:
            error = NoWorker(f"{why} (waited {self.wait_s:g} s)")
            sequence.timer = self.timers.call_later(self.wait_s, self._over, sequence, error)

    def remove(self, sequence: SequenceState) -> None:
        """The sequence has ended; its timer is the caller's."""
        self._steps.pop(sequence, None)

    def try_all(self, run: Callable[[SequenceState, Step], None]) -> None:
        """A worker came or went: `run` is called with every sequence and its step."""
        for sequence, step in list(self._steps.items()):
            if self._steps.pop(sequence, None) is None:
                continue
            timer, sequence.timer = sequence.timer, None
            run(sequence, step)
            if sequence in self._steps:  # still nobody: the wait goes on from where it was
                sequence.stop_timer()
                sequence.timer = timer
            elif timer is not None:
                timer.cancel()

    def _over(self, sequence: SequenceState, error: NoWorker) -> None:
        self.remove(sequence)
        self.give_up(sequence, error)
