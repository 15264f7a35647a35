"""The life-cycle events of one sequence: one name each, in spans, metrics, logs and reports.

Two identities hold by construction, for stages() of every sequence:
TTFT = admission + routing + prefill_queue + prefill + delivery, and
hand-off stall (token 0 to token 1) = decode_queue + reserve + pull + fence + first_step.
"""

from __future__ import annotations

from dataclasses import dataclass

from crossdock.proto import events
from crossdock.proto.settings import setting
from crossdock.proto.types import LIFE_CYCLE
from crossdock.proto.v1 import inference_pb2, worker_pb2

WORKER_EVENTS = tuple(
    name for name in worker_pb2.SequenceTimes.DESCRIPTOR.fields_by_name if name != "first_token"
)
_WORKER_EVENTS = frozenset(WORKER_EVENTS)
TTFT_STAGES = ("admission", "routing", "prefill_queue", "prefill", "delivery")
STALL_STAGES = ("decode_queue", "reserve", "pull", "fence", "first_step")


@dataclass(frozen=True)
class Slo:
    """What counts as good: a sequence within both is one of goodput."""

    ttft_ms: float = setting(2000.0, "Time to first token aimed at.", low=1, high=3_600_000)
    tpot_ms: float = setting(100.0, "Time per output token aimed at.", low=0.1, high=3_600_000)


class Timeline:
    """When each event of one sequence happened, in seconds since the request was received.

    The gateway's own events come from its clock. Workers report wall-clock milliseconds, which are
    mapped over the moment of receipt and kept in order, so that a skewed clock distorts a stage but
    never a sum. An event keeps its first time: a sequence that is prefilled again has one TTFT.
    """

    def __init__(self, received: float, received_unix: float, request_id: str = "") -> None:
        self._request_id = request_id
        self._received = received
        self._received_unix = received_unix
        self._at: dict[str, float] = {}
        self._newest: float | None = None  # when the newest token was delivered, on that clock
        self._sampled: float | None = None  # token 0 was drawn on its worker
        self._second: float | None = None  # token 1 was delivered
        self._done: dict[str, float] | None = None  # in order, once it has finished

    def mark(self, event: str, now: float) -> None:
        """An event that the gateway itself saw, on its clock."""
        self._at.setdefault(event, now - self._received)
        self._done = None
        events.emit("delivered" if event == "first_token" else event, self._request_id)

    def mark_second_token(self, now: float) -> None:
        self._second = now - self._received

    def merge(self, times: worker_pb2.SequenceTimes) -> None:
        """What a worker reported; unset fields are events that did not happen there."""
        self._done = None
        for field, wall_ms in times.ListFields():
            if field.name in _WORKER_EVENTS:
                self._at.setdefault(field.name, wall_ms / 1000 - self._received_unix)
        if times.first_token and self._sampled is None:
            self._sampled = times.first_token / 1000 - self._received_unix

    @property
    def first_token(self) -> float | None:
        return self._at.get("first_token")

    @property
    def last_token(self) -> float | None:
        """The newest that was delivered."""
        return None if self._newest is None else self._newest - self._received

    def token(self, now: float) -> float | None:
        """The newest token is delivered; returns seconds since the one before, or None."""
        before, self._newest = self._newest, now
        return None if before is None else now - before

    def first(self, now: float) -> float:
        """The first is; returns seconds since the request was received."""
        self._newest = now
        self.mark("first_token", now)
        return now - self._received

    def ordered(self) -> dict[str, float]:
        """Event -> seconds, never decreasing in the order of LIFE_CYCLE.

        Times of the gateway's clock are kept; a worker's time is moved to the nearest that fits
        between the gateway's events around it. Not to be changed.
        """
        if self._done is not None:
            return self._done
        done = self._ordered()
        if "finished" in self._at:
            self._done = done
        return done

    def _ordered(self) -> dict[str, float]:
        known = self._at
        if (newest := self.last_token) is not None:
            known = known | {"last_token": newest}
        own = {e: t for e, t in known.items() if e not in _WORKER_EVENTS}
        limit = float("inf")
        upper: dict[str, float] = {}
        for event in reversed(LIFE_CYCLE):
            if event == "joined" and self._second is not None:
                limit = min(limit, self._second)
            limit = min(limit, own.get(event, limit))
            upper[event] = limit
        done: dict[str, float] = {}
        last = 0.0
        for event in LIFE_CYCLE:
            if event in known:
                last = max(last, min(known[event], upper[event]))
                done[event] = last
        return done

    def stages(self) -> dict[str, float]:
        """Stage -> seconds, for the stages that the sequence went through."""
        at = self.ordered()
        found: dict[str, float] = {}
        if "first_token" in at:
            start = at.get("prefill_started", at.get("routed", 0.0))
            sampled = at["first_token"] if self._sampled is None else self._sampled
            sampled = min(max(sampled, start), at["first_token"])
            marks = [0.0, at.get("admitted", 0.0), at.get("routed", 0.0), start, sampled]
            marks.append(at["first_token"])
            found |= _between(TTFT_STAGES, marks)
        if "fenced" in at and self._second is not None:
            marks = [at["first_token"]]
            marks += [at.get(e, at["first_token"]) for e in ("decode_queued", "reserved")]
            marks += [at.get("pulled", at["fenced"]), at["fenced"], self._second]
            found |= _between(STALL_STAGES, marks)
        return found

    def timings(self) -> inference_pb2.Timings:
        return inference_pb2.Timings(**self.ordered())  # type: ignore[arg-type]


def _between(names: tuple[str, ...], marks: list[float]) -> dict[str, float]:
    last = marks[0]
    found = {}
    for name, mark in zip(names, marks[1:], strict=True):
        mark = max(mark, last)
        found[name] = mark - last
        last = mark
    return found
