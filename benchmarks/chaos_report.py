"""What came of a chaos run: every token compared, every fault placed in the life of the requests it
struck, and the time from each kill to the next token of the requests it hit."""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chaos_faults import Kind, Planned, Struck
from chaos_journal import ROLES, STATES, Journal

TIE = 1e-3  # of two logprobs: closer ones may swap when a prompt is computed in other chunks
MIN_REQUESTS, MIN_FAULTS, MIN_KILLS = 300, 100, 25
MAX_P50_S, MAX_P99_S, MAX_SETTLE_S = 3.0, 15.0, 10.0
MAX_ROUND_S = 240.0  # besides the starts of those killed, which are the engine's


class End(enum.StrEnum):
    FINISHED = "finished"
    ABORTED = "aborted"
    REFUSED = "refused"  # a retriable error, as when more than two workers died under it
    FAILED = "failed"
    HUNG = "hung"


@dataclass(frozen=True)
class Undisturbed:
    """What a request is answered with when nothing happens to it."""

    token_ids: tuple[int, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]  # of each position the two likeliest


@dataclass
class Asked:
    """One request under chaos, as its client saw it."""

    request: str
    case: int
    asked_at: float
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    end: End | None = None
    ended_at: float = math.inf
    error: str = ""


class Verdict(enum.Enum):
    EQUAL = "equal"
    TIE = "tie"
    WRONG = "wrong"


def compare(seen: Asked, undisturbed: Undisturbed) -> tuple[Verdict, int]:
    """The verdict on a stream and the position it first differs at. A finished one must be whole,
    any other a beginning."""
    pairs = enumerate(zip(seen.token_ids, undisturbed.token_ids))
    at = next((i for i, (found, right) in pairs if found != right), -1)
    if at < 0:
        length, whole = len(seen.token_ids), len(undisturbed.token_ids)
        fits = length == whole if seen.end is End.FINISHED else length <= whole
        return (Verdict.EQUAL, -1) if fits else (Verdict.WRONG, min(length, whole))
    top = undisturbed.top[at]
    swapped = {seen.token_ids[at], undisturbed.token_ids[at]} == {token for token, _ in top[:2]}
    tied = len(top) > 1 and swapped and top[0][1] - top[1][1] <= TIE
    return (Verdict.TIE if tied else Verdict.WRONG), at


@dataclass(frozen=True)
class Recovery:
    """From a kill to the next token of one request that the victim held."""

    seconds: float
    spare: bool
    state: str
    struck: Struck


def recoveries(
    struck: Sequence[Struck], asked: Sequence[Asked], journal: Journal
) -> list[Recovery]:
    found: list[Recovery] = []
    by_request = {each.request: each for each in asked}
    for hit in struck:
        if hit.planned.kind is not Kind.KILL:
            continue
        for request in journal.held_by(hit.worker, hit.at):
            seen = by_request.get(request)
            after = [at for at in seen.token_times if at > hit.at] if seen else []
            if after:
                state = journal.lives[request].state(hit.at)
                found.append(Recovery(after[0] - hit.at, hit.spare, state, hit))
    return found


def starts(struck: Sequence[Struck], journal: Journal) -> list[tuple[str, float]]:
    """Of each kill the victim's role, and seconds until its place was taken and known to the
    gateway."""
    found = []
    for hit in struck:
        if hit.planned.kind is Kind.KILL:
            lives = [w for w in journal.workers.values() if w.name == hit.worker and w.connected]
            again = [w.connected[0] for w in lives if w.connected[0] > hit.at]
            found += [(hit.planned.role, min(again) - hit.at)] if again else []
    return found


def struck_states(struck: Sequence[Struck], journal: Journal) -> dict[Kind, Counter[str]]:
    """How many requests each kind of fault struck in each state: the one it was aimed at, and for
    signals all that the victim held. A request that one process kept standing still may have gone
    on in another, as where a prompt is pulled while it is computed: it was struck in both."""
    counts: dict[Kind, Counter[str]] = {kind: Counter() for kind in Kind}
    for hit in struck:
        hurt = {hit.request} if hit.aimed else set()
        if hit.worker:
            hurt |= set(journal.held_by(hit.worker, hit.at))
        for request in hurt & journal.lives.keys():
            states = {journal.lives[request].state(hit.at)}
            if request == hit.request:
                states |= {hit.stood_in} & set(STATES)
            for state in states:
                counts[hit.planned.kind][state] += 1
    return counts


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all are not above; 0.0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


@dataclass
class Outcome:
    """A run that is over."""

    asked: list[Asked]
    undisturbed: list[Undisturbed]
    struck: list[Struck]
    missed: list[Planned]
    journal: Journal
    rounds: float
    seconds: float
    settled_s: float  # after the load, until nothing was held anywhere and all blocks accounted for
    unsettled: list[str]  # what was still wrong when waiting for that ended

    @property
    def kills(self) -> Counter[str]:
        return Counter(h.planned.role for h in self.struck if h.planned.kind is Kind.KILL)

    @property
    def starting_s(self) -> float:
        """How long faults may have waited for workers to start: kills strike where two of the role
        are up, so the starts of the role that was hurt more come one after the other."""
        started = starts(self.struck, self.journal)
        return max(sum(s for role, s in started if role == each) for each in ROLES)

    def verdicts(self) -> Counter[Verdict]:
        return Counter(compare(each, self.undisturbed[each.case])[0] for each in self.asked)

    def wrong(self) -> list[str]:
        found = []
        for each in self.asked:
            verdict, at = compare(each, self.undisturbed[each.case])
            if verdict is Verdict.WRONG:
                right = self.undisturbed[each.case].token_ids
                found.append(
                    f"{each.request} (case {each.case}, {each.end}): {len(each.token_ids)} tokens, "
                    f"the first wrong at {at} of {len(right)}: {each.token_ids[at : at + 1]} for "
                    f"{list(right[at : at + 1])}"
                )
        return found

    def ends(self) -> Counter[End | None]:
        return Counter(each.end for each in self.asked)

    def not_struck(self) -> list[str]:
        """Life-cycle states in which no request was struck by some kind of fault."""
        counts = struck_states(self.struck, self.journal)
        return [f"{kind} at {s}" for kind in Kind for s in STATES if not counts[kind][s]]

    def failures(self) -> list[str]:
        """All parts that do not hold but those that depend on the machine's speed."""
        ends, kills = self.ends(), self.kills
        never = sum(each.end is None for each in self.asked)
        part = min(1, self.rounds)
        requests, faults = int(MIN_REQUESTS * part), int(MIN_FAULTS * part)
        missing = self.not_struck() if part == 1 else []
        checks = {
            f"{len(self.asked)} requests of {requests}": len(self.asked) < requests,
            f"{len(self.struck)} faults of {faults}": len(self.struck) < faults,
            f"{ends[End.HUNG]} requests hang": ends[End.HUNG] > 0,
            f"{never} requests never ended": never > 0,
            f"{ends[End.FAILED]} requests failed for good": ends[End.FAILED] > 0,
            f"faults that found no place: {self.missed[:5]}": bool(self.missed),
            f"nobody struck: {', '.join(missing)}": bool(missing),
        }
        for role in ROLES if part == 1 else ():
            few = kills[role] < MIN_KILLS
            checks[f"{kills[role]} kills of {role} workers of {MIN_KILLS}"] = few
        found = [text for text, fails in checks.items() if fails]
        errors = [f"{e.request}: {e.error}" for e in self.asked if e.end in (End.FAILED, End.HUNG)]
        return [*found, *self.wrong(), *errors, *self.unsettled]

    def slow(self) -> list[str]:
        """The parts that depend on the machine's speed and do not hold."""
        spared = [r.seconds for r in recoveries(self.struck, self.asked, self.journal) if r.spare]
        p50, p99 = percentile(spared, 0.5), percentile(spared, 0.99)
        refused = self.ends()[End.REFUSED]  # more where no worker comes back in time
        most = MAX_ROUND_S * self.rounds + self.starting_s
        checks = {
            f"recovery p50 {p50:.2f} s > {MAX_P50_S:g} s": p50 > MAX_P50_S,
            f"recovery p99 {p99:.2f} s > {MAX_P99_S:g} s": p99 > MAX_P99_S,
            f"{refused} requests refused": refused > len(self.asked) / 50,
            f"{self.seconds:.0f} s of faults > {most:.0f} s": self.seconds > most,
            f"settled after {self.settled_s:.1f} s": self.settled_s > MAX_SETTLE_S,
        }
        return [text for text, fails in checks.items() if fails]

    def lines(self) -> list[str]:
        kinds = Counter(hit.planned.kind for hit in self.struck)
        ends, verdicts = self.ends(), self.verdicts()
        found = recoveries(self.struck, self.asked, self.journal)
        started = [seconds for _, seconds in starts(self.struck, self.journal)]
        tokens = sum(len(each.token_ids) for each in self.asked)
        return [
            f"requests {len(self.asked)} ({tokens} tokens) in {self.seconds:.0f} s: "
            + ", ".join(f"{end} {ends[end]}" for end in End),
            f"faults {len(self.struck)}: "
            + ", ".join(f"{kind} {kinds[kind]}" for kind in Kind)
            + "; kills of "
            + ", ".join(f"{role} workers {self.kills[role]}" for role in ROLES),
            f"streams equal {verdicts[Verdict.EQUAL]}, ties {verdicts[Verdict.TIE]}, "
            f"wrong {verdicts[Verdict.WRONG]}",
            "recovery, kill to next token: "
            + "; ".join(
                _spread(name, [r.seconds for r in found if spare in (None, r.spare)])
                for name, spare in (("a spare up", True), ("none up", False), ("all", None))
            ),
            _spread("worker start, kill to connected", started),
            f"whole again, nothing held, every block accounted for: {self.settled_s:.1f} s after",
            *self._table(),
            *(f"refused, {count}: {why}" for why, count in self._refusals().most_common(5)),
        ]

    def _refusals(self) -> Counter[str]:
        texts = (each.error for each in self.asked if each.end is End.REFUSED)
        return Counter(re.sub(r"\d+", "N", text) for text in texts)

    def _table(self) -> list[str]:
        """Requests struck in each state, by kind of fault."""
        counts = struck_states(self.struck, self.journal)
        head = f"{'struck in state':16}" + "".join(f"{kind:>8}" for kind in Kind)
        states = [*STATES, *sorted({s for c in counts.values() for s in c} - set(STATES))]
        return [head] + [
            f"  {s or '(before)':14}" + "".join(f"{counts[kind][s]:8}" for kind in Kind)
            for s in states
        ]


def _spread(name: str, seconds: Sequence[float]) -> str:
    return (
        f"{name} p50 {percentile(seconds, 0.5):.2f} s, p99 {percentile(seconds, 0.99):.2f} s, "
        f"max {max(seconds, default=0.0):.2f} s ({len(seconds)})"
    )
