"""Refused requests in the audit log: the first of a kind have lines of their own, the rest are
counted by one line, so that nobody fills the disk by being refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPAN_S = 60.0
SEPARATE = 10  # lines of one credential's refusals of one outcome within a span
MAX_KINDS = 1000  # told apart at once; those beyond them are counted by outcome alone

Kind = tuple[str | None, str | None, str]  # tenant, key, outcome; None: of many


@dataclass
class _Span:
    """Refusals of one kind."""

    began: float  # on the clock
    lines: int = 0
    counted: int = 0
    first: float = 0.0  # of those that are counted, on the wall clock
    last: float = 0.0


class Refusals:
    """Of one gateway. `clock`: seconds, which never go back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spans: dict[Kind, _Span] = {}  # in the order in which they began

    def separate(self, record: dict[str, Any]) -> bool:
        """Whether a refused request gets a line of its own; it is counted where it does not."""
        kind: Kind = record.get("tenant", ""), record.get("key", ""), record.get("outcome", "")
        if kind not in self._spans and len(self._spans) >= MAX_KINDS:
            kind = None, None, kind[2]
        span = self._spans.setdefault(kind, _Span(self._clock()))
        if span.lines < SEPARATE and kind[0] is not None:
            span.lines += 1
            return True
        span.last = record.get("time", 0.0)
        span.first = span.first if span.counted else span.last
        span.counted += 1
        return False

    def told(self, *, everything: bool = False) -> list[dict[str, Any]]:
        """The lines of the spans that are over, or of all; they are forgotten."""
        now, lines = self._clock(), []
        for kind, span in list(self._spans.items()):
            if not everything and now < span.began + SPAN_S:
                break
            del self._spans[kind]
            if span.counted:
                about = {"tenant": kind[0] or "", "key": kind[1] or "", "outcome": kind[2]}
                when = {"time": span.last, "since": span.first}
                lines.append({"kind": "refused", **when, **about, "count": span.counted})
        return lines
