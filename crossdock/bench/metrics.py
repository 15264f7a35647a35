"""What a load test measures: each metric by its name, with its formula.

Plain numbers in, plain numbers out: no clock, no network. All times are seconds on one clock.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from crossdock.proto.errors import InvalidRequest

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class RequestRecord:
    """One request as the client saw it."""

    index: int
    due_s: float  # when the schedule wanted it sent
    sent_s: float
    arrivals_s: tuple[float, ...] = ()  # of each chunk that carried tokens
    finished_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""  # its kind; empty where it succeeded
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended without an error."""
        return not self.error

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token; None: none came."""
        return self.arrivals_s[0] - self.sent_s if self.arrivals_s else None

    @property
    def itl(self) -> list[float]:
        """Seconds between tokens that follow each other."""
        return [later - earlier for earlier, later in pairwise(self.arrivals_s)]

    @property
    def tpot(self) -> float | None:
        """Mean seconds a token after the first; None below two tokens."""
        if self.output_tokens < 2 or not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last token."""
        return self.finished_s - self.sent_s

    def samples(self, latency: str) -> list[float]:
        """Its values of one of LATENCIES, seconds; none where it is too short to have any."""
        value = getattr(self, latency)
        if value is None:
            return []
        return value if isinstance(value, list) else [value]


# Properties of a request, pooled over all that succeeded: mean, p50, p90, p99 and max of each.
LATENCIES = {
    "ttft": "time to first token = arrival of the first chunk with a token - request sent",
    "itl": "inter-token latency = arrival of a chunk with tokens - arrival of the one before it, "
    "all gaps of all requests pooled; a chunk of several tokens is one arrival "
    "(see tokens_per_chunk)",
    "tpot": "time per output token = (arrival of the last token - arrival of the first) / "
    "(output tokens - 1), for each request of two tokens or more",
    "e2e": "end-to-end latency = end of the stream - request sent",
}


@dataclass(frozen=True)
class Run:
    """All records of one measured run, and what counts as good."""

    records: tuple[RequestRecord, ...]
    slo: tuple[tuple[str, float], ...] = ()

    @property
    def succeeded(self) -> list[RequestRecord]:
        """The records without an error."""
        return [record for record in self.records if record.ok]

    @property
    def duration_s(self) -> float:
        """Seconds from the first request to the last end."""
        if not self.records:
            return 0.0
        started = min(record.sent_s for record in self.records)
        return max(record.finished_s for record in self.records) - started

    def tokens(self, kind: str) -> int:
        """The "prompt", "output" or "cached" tokens of the requests that succeeded."""
        return sum(getattr(record, f"{kind}_tokens") for record in self.succeeded)

    @property
    def good(self) -> list[RequestRecord]:
        """The records within the objectives."""
        return [record for record in self.succeeded if meets(record, self.slo)]


RunMetrics = dict[str, tuple[str, Callable[[Run], float]]]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# Formulas, and what computes them.
TOTALS: RunMetrics = {
    "duration_s": (
        "last request's end - first request sent (warm-up excluded)",
        lambda run: run.duration_s,
    ),
    "requests": ("requests sent", lambda run: len(run.records)),
    "failed": ("requests that ended in an error", lambda r: len(r.records) - len(r.succeeded)),
    "request_throughput": (
        "requests that succeeded / duration",
        lambda run: _share(len(run.succeeded), run.duration_s),
    ),
    "output_throughput": (
        "output tokens of requests that succeeded / duration",
        lambda run: _share(run.tokens("output"), run.duration_s),
    ),
    "total_throughput": (
        "prompt and output tokens of requests that succeeded / duration",
        lambda run: _share(run.tokens("output") + run.tokens("prompt"), run.duration_s),
    ),
    "prompt_tokens": (
        "prompt tokens of requests that succeeded, as the server counts them",
        lambda run: run.tokens("prompt"),
    ),
    "output_tokens": (
        "output tokens of requests that succeeded, as the server counts them",
        lambda run: run.tokens("output"),
    ),
    "cached_tokens": (
        "prompt tokens whose KV the server found in a cache",
        lambda run: run.tokens("cached"),
    ),
    "hit_rate": (
        "cached tokens / prompt tokens, of requests that succeeded",
        lambda run: _share(run.tokens("cached"), run.tokens("prompt")),
    ),
    "tokens_per_chunk": (
        "output tokens / chunks that carried tokens, of requests that succeeded",
        lambda run: _share(run.tokens("output"), sum(len(r.arrivals_s) for r in run.succeeded)),
    ),
    "max_send_lag_s": (
        "largest (request sent - when its schedule wanted it sent): the load generator's own delay",
        lambda run: max((record.sent_s - record.due_s for record in run.records), default=0.0),
    ),
}

GOODPUT: RunMetrics = {
    "goodput": (
        "requests that succeeded and met every SLO / duration; of a request, the SLO bounds its "
        "ttft, its tpot, its largest itl, its e2e",
        lambda run: _share(len(run.good), run.duration_s),
    ),
    "slo_attainment": (
        "requests that succeeded and met every SLO / requests sent",
        lambda run: _share(len(run.good), len(run.records)),
    ),
}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks. Raises ValueError for no values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def meets(record: RequestRecord, slo: Sequence[tuple[str, float]]) -> bool:
    """A request too short to have a metric meets its bound."""
    return all(max(record.samples(name), default=0.0) <= limit for name, limit in slo)


def summarize(run: Run) -> dict[str, object]:
    """Every metric by its name; latencies in seconds. A latency without samples is absent."""
    report: dict[str, object] = {name: of(run) for name, (_, of) in TOTALS.items()}
    if run.slo:
        report |= {name: of(run) for name, (_, of) in GOODPUT.items()}
    for name in LATENCIES:
        samples = [each for record in run.succeeded for each in record.samples(name)]
        if samples:
            report[f"{name}_s"] = distribution(samples)
    return report


def distribution(samples: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum, in the samples' unit; there must be one."""
    shown = {f"p{percent}": percentile(samples, percent) for percent in PERCENTILES}
    return {"mean": sum(samples) / len(samples), **shown, "max": max(samples)}


def count_errors(records: Iterable[RequestRecord]) -> dict[str, dict[str, object]]:
    """By kind: how many, and the words of one of them."""
    failed = [record for record in records if not record.ok]
    words = {record.error: record.message for record in reversed(failed)}
    counts = Counter(record.error for record in failed)
    return {kind: {"count": count, "example": words[kind]} for kind, count in counts.most_common()}


def parse_slo(text: str) -> tuple[tuple[str, float], ...]:
    """`ttft=2s,tpot=100ms` to bounds in seconds; a bare number is in seconds."""
    bounds = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\d+\.?\d*|\.\d+)\s*(ms|s|)", part)
        if match is None or match[1] not in LATENCIES:
            limit = f"give {', '.join(LATENCIES)} as in ttft=2s,tpot=100ms"
            raise InvalidRequest("slo", part, limit)
        bounds.append((match[1], float(match[2]) * (0.001 if match[3] == "ms" else 1.0)))
    return tuple(bounds)


def explain() -> list[tuple[str, str]]:
    """(name, formula) of every metric."""
    totals = [(name, formula) for name, (formula, _) in (TOTALS | GOODPUT).items()]
    return [*LATENCIES.items(), *totals]
