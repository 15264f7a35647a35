"""How much of something was used within any 60 seconds."""

from __future__ import annotations

from collections import deque

SPAN_S = 60.0
SLOT_S = 0.1  # what is used within a slot is forgotten together, at the end of the last one's span


class Window:
    """Sums amounts over the last 60 s; of fixed size however many there are. Nothing is forgotten
    early, so a limit that every addition respects holds in each 60 s, wherever they begin."""

    def __init__(self) -> None:
        self._slots: deque[list[float]] = deque()  # [number of the slot, amount], the oldest first
        self._sum = 0.0

    def used(self, now: float) -> float:
        """What was added in the 60 s before `now`."""
        while self._slots and _forgotten(self._slots[0][0]) <= now:
            self._sum -= self._slots.popleft()[1]
        return self._sum if self._slots else 0.0

    def add(self, now: float, amount: float) -> None:
        """Uses so much at `now`, which never goes back."""
        self.used(now)
        number = now // SLOT_S
        if not self._slots:
            self._sum = 0.0
        if self._slots and self._slots[-1][0] >= number:
            self._slots[-1][1] += amount
        else:
            self._slots.append([number, amount])
        self._sum += amount

    def correct(self, at: float, now: float, amount: float) -> None:
        """What was used at `at` turned out to be `amount` more, or less where that is below 0; more
        than was forgotten meanwhile counts from now on."""
        self.used(now)
        number = at // SLOT_S
        for slot in reversed(self._slots):  # most are corrected soon
            if slot[0] == number:
                slot[1] += amount
                self._sum += amount
                return
            if slot[0] < number:
                break
        if amount > 0:
            self.add(now, amount)

    def wait_s(self, now: float, amount: float, limit: float) -> float:
        """Seconds until `amount` more is within `limit`; it must not be above that itself."""
        excess = self.used(now) + amount - limit
        for number, of_slot in self._slots:
            if excess <= 0:
                break
            excess -= of_slot
            if excess <= 0:
                return max(0.0, _forgotten(number) - now)
        return 0.0

    def empty_s(self, now: float) -> float:
        """Seconds until all is forgotten."""
        return max(0.0, _forgotten(self._slots[-1][0]) - now) if self.used(now) else 0.0


def _forgotten(number: float) -> float:
    return (number + 1) * SLOT_S + SPAN_S
