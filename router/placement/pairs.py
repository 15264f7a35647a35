"""How fast pulls between two workers go, and which pairs are left alone after one that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DEFAULT_BANDWIDTH = 1e9  # bytes/s
BANDWIDTH_MEMORY = 0.8  # how much of the pulls before counts beside the newest one
FASTEST_MEMORY = 0.99  # the same, of the best pair beside the newest pull of any
# First and longest time that a pair is left alone after a failed pull; each further one doubles it.
PAIR_BACK_OFF_S = (5.0, 30.0)

NO_PULLS: Mapping[str, float] = {}


class Pairs:
    """Pairs of a prefill and a decode worker, by their names."""

    def __init__(self) -> None:
        # prefill -> decode -> seconds a byte, and the bytes that this rests on; older pulls fade.
        self._seconds: dict[str, dict[str, float]] = {}
        self._bytes: dict[str, dict[str, float]] = {}
        self._fastest = 0.0  # bytes/s of the best pair lately; fades with every pull
        self.least = 1 / DEFAULT_BANDWIDTH  # seconds a byte; no pair has had less
        # (prefill, decode) -> until when it backs off, and for how long; since the last good pull.
        self._back_offs: dict[tuple[str, str], tuple[float, float]] = {}

    def transferred(self, prefill: str, decode: str, nbytes: int, seconds: float) -> None:
        """Folds one measured pull into the pair's bandwidth, so that large pulls count most. The
        pair works."""
        if nbytes <= 0 or seconds <= 0:
            return
        self._back_offs.pop((prefill, decode), None)
        per_byte, known = (each.setdefault(prefill, {}) for each in (self._seconds, self._bytes))
        before = BANDWIDTH_MEMORY * known.get(decode, 0.0)
        known[decode] = before + nbytes
        per_byte[decode] = (before * per_byte.get(decode, 0.0) + seconds) / known[decode]
        self.least = min(self.least, per_byte[decode])
        self._fastest = max(1 / per_byte[decode], FASTEST_MEMORY * self._fastest)

    def failed(self, prefill: str, decode: str, now: float) -> None:
        """The link of the two may be cut, though both are well: others are taken for a while."""
        first, longest = PAIR_BACK_OFF_S
        until, back_off = self._back_offs.get((prefill, decode), (float("-inf"), 0.0))
        if now < until:
            return  # of the pulls that were under way when the first one failed
        back_off = first if now - until > longest else min(2 * back_off, longest)
        self._back_offs[prefill, decode] = (now + back_off, back_off)

    def backs_off(self, prefill: str, decode: str, now: float) -> bool:
        """Whether a pull between the two failed lately, and none succeeded since."""
        return now < self._back_offs.get((prefill, decode), (now, 0.0))[0]

    @property
    def any_backs_off(self) -> bool:
        """Cheap, and false on most days."""
        return bool(self._back_offs)

    def cut_off(self, prefills: Sequence[str], now: float) -> set[str]:
        """The decode workers that back off from all of `prefills`."""
        decodes = {decode for _, decode in self._back_offs}
        return {d for d in decodes if all(self.backs_off(p, d, now) for p in prefills)}

    def bandwidth(self, prefill: str, decode: str) -> float:
        """Bytes per second of pulls between the two, as measured or presumed."""
        return 1 / self.seconds_per_byte(prefill).get(decode, self.presumed)

    @property
    def presumed(self) -> float:
        """Seconds a byte of a pair that was not measured: it is presumed to be as good as the best,
        so that it gets its turn to be measured."""
        return 1 / (self._fastest or DEFAULT_BANDWIDTH)

    def seconds_per_byte(self, prefill: str) -> Mapping[str, float]:
        """What was measured of pulls from one prefill worker, by decode worker."""
        return self._seconds.get(prefill, NO_PULLS)

    def forget(self, name: str) -> None:
        """A worker is gone: whoever takes its name has links of its own."""
        for table in (self._seconds, self._bytes):
            table.pop(name, None)
            for row in table.values():
                row.pop(name, None)
        self._back_offs = {pair: v for pair, v in self._back_offs.items() if name not in pair}
