"""How long a member may be silent, and what happens to one that is silent for longer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from trust_kit import NO_AUTHORITY, Uncertified

from crossdock.deploy import members
from crossdock.deploy.members import Watched, WatchSettings, patience_s
from crossdock.deploy.reconcile import State
from crossdock.deploy.runtime import Started, gateway_launch, worker_launch
from crossdock.deploy.spec import ClusterSpec
from crossdock.proto.v1.worker_pb2 import Load

SPEC = ClusterSpec.parse("""
metadata: {name: test}
model: {id: any}
pools: {both: {role: colocated, chunk_tokens: 256, max_batch: 64}}
""")
WORKER = worker_launch(SPEC, "both", "both-0", bytes(32)).worker


@pytest.mark.parametrize(
    "load, seconds",
    [
        (None, 30),
        (Load(), 30),
        (Load(step_base_s=0.01), 8),
        (Load(step_base_s=0.04, step_per_sequence_s=0.02), 13.2),  # 1.32 s at 64 sequences
        (Load(prefill_tokens_per_s=160), 16),  # 1.6 s a chunk
        (Load(step_base_s=0.1, prefill_tokens_per_s=160), 16),
        (Load(step_base_s=0.1), 25.6),  # a chunk nobody measured: its tokens one by one
        (Load(step_base_s=3.0), 30),
    ],
)
def test_a_worker_may_be_silent_for_ten_of_its_longest_steps(load, seconds):
    assert patience_s(WatchSettings(), WORKER, load) == pytest.approx(seconds)


def test_a_gateway_may_be_silent_for_seconds():
    assert patience_s(WatchSettings(), None, None) == 8


class Clock:
    """The time of `members`: sleeps take no time but the clock's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._sleep = asyncio.sleep
        own = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr(members, "time", own)
        monkeypatch.setattr(members.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await self._sleep(0)


async def watched_gateway(clock: Clock, answers) -> tuple[Watched, list[object]]:
    """A gateway whose next probes go as `answers` says, and what was done to it until it is lost:
    its stop, with the time, and its state then."""
    done: list[object] = []
    gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Process(Uncertified):
        async def start(self):
            return Started(1, "node")

        async def gone(self):
            return await gone

        async def active_requests(self):
            took, well = next(answers)
            clock.now += took
            if not well:
                raise TimeoutError
            return 0

        async def stop(self, grace_s):
            done.append((grace_s, watched.state, clock.now))
            gone.set_result("its process died (SIGKILL)")

    launch = gateway_launch(SPEC, "gateway-0", 0, bytes(32), bytes(32))
    watched = Watched(launch, Process(), lambda: None, WatchSettings(), NO_AUTHORITY)
    async with asyncio.timeout(10):
        while watched.state is not State.LOST:
            await clock._sleep(0)
    return watched, done


async def test_one_that_hangs_is_ended_before_it_is_given_up(monkeypatch):
    """So that its ports are free when the next one starts; and the reason is the true one."""
    clock = Clock(monkeypatch)
    watched, done = await watched_gateway(clock, iter([(0.01, True), *[(4.0, False)] * 9]))
    [(grace_s, state, at)] = done
    assert grace_s == 0 and state is State.READY
    assert at - 1001.01 == pytest.approx(10), "two unanswered probes and the pauses before them"
    assert watched.why == "did not answer for 10 s"


async def test_a_pause_of_the_controller_is_no_silence_of_its_members(monkeypatch):
    """Its probe ran out while it stood still itself: the next one is answered."""
    clock = Clock(monkeypatch)
    story = [(500.0, False), *[(0.01, True)] * 20, *[(4.0, False)] * 9]
    _, [(_, _, at)] = await watched_gateway(clock, iter(story))
    assert at > 1000 + 500 + 20


async def test_how_long_it_took_to_start_is_known_of_what_was_started_here(monkeypatch):
    clock = Clock(monkeypatch)
    watched, _ = await watched_gateway(clock, iter([(0.01, True), *[(4.0, False)] * 9]))
    assert watched.start_s == watched.ready_at - watched.launched_at
    watched.adopted = True
    assert watched.start_s is None, "it ran before"
    watched.adopted, watched.ready_at = False, None
    assert watched.start_s is None, "it is not ready"
