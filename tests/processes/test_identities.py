"""Where a request's time goes: the parts of TTFT and of the hand-off's stall, each checked against
other clocks than the one that adds them up.

The gateway makes the stages from its own marks and the times that workers report, and keeps them in
order; so that they sum to the whole says little. Checked here, for every one of 1,000 requests:
each stage equals the difference of the times that the workers put into their own spans; the whole
lies between the moments at which the client sent, and received token 0 and token 1; and a delay
that is planted in one stage is found in that stage, and by the client.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cluster_kit import Cluster, start, stop
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from crossdock.kvtransfer.transport import Handle, HandleState
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.router.dispatch import tracing as router_tracing
from crossdock.router.dispatch.lifecycle import STALL_STAGES, TTFT_STAGES
from crossdock.worker import tracing as worker_tracing

REQUESTS = 1000
AT_ONCE = 24
CHUNK = 64
MS = 0.001
DELAY_S = 0.15
WAIT_S = 30.0


@dataclass
class Seen:
    """What the client saw of its request, on its own wall clock."""

    sent: float = 0.0
    at: list[float] = field(default_factory=list)  # of every token
    together: bool = False  # the first two tokens came in one message
    cached: int = 0


@dataclass
class Traced:
    """What was exported of one request. Times are Unix seconds."""

    request: ReadableSpan
    stages: dict[str, float]
    prefills: list[dict[str, float]]  # event -> time, of each attempt, oldest first
    decodes: list[dict[str, float]]

    @property
    def received(self) -> float:
        return self.request.start_time / 1e9

    def event(self, name: str) -> float:
        return next(e.timestamp for e in self.request.events if e.name == name) / 1e9

    @property
    def first_token(self) -> float:
        return self.event("first_token")

    @property
    def handed_off(self) -> bool:
        return STALL_STAGES[0] in self.stages

    @property
    def second_token(self) -> float:
        return self.first_token + sum(self.stages[stage] for stage in STALL_STAGES)

    @property
    def restarted_between(self) -> bool:
        """Token 1 was drawn by a second prefill: no hand-off lies between it and token 0."""
        again = self.prefills[1]["prefill_queued"] if len(self.prefills) > 1 else float("inf")
        return not self.handed_off or again < self.second_token


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (router_tracing, worker_tracing):
        monkeypatch.setattr(module, "_tracer", provider.get_tracer("test"))
    return exporter


@pytest.fixture
async def pair(tiny_model: Path) -> AsyncIterator[Cluster]:
    cluster = await start(tiny_model, [Role.PREFILL, Role.DECODE], chunk_tokens=CHUNK)
    yield cluster
    await stop(cluster)


async def ask(
    cluster: Cluster,
    name: str,
    prompt: list[int] | str,
    tokens: int,
    on_token: Callable[[int], None] = lambda count: None,
) -> Seen:
    seen = Seen(sent=time.time())
    stream = cluster.client.stream(
        prompt, max_tokens=tokens, temperature=0, ignore_eos=True, request_id=name, timeout=120
    )
    async for chunk in stream:
        now = time.time()
        if not seen.at:
            seen.together = len(chunk.token_ids) > 1
        seen.at += [now] * len(chunk.token_ids)
        on_token(len(seen.at))
        if chunk.usage is not None:
            seen.cached = chunk.usage.cached_tokens
    assert len(seen.at) == tokens
    return seen


async def traced(exporter: InMemorySpanExporter, count: int) -> dict[str, Traced]:
    """By request id, once all spans of `count` requests are out."""
    name_of: dict[int, str] = {}
    async with asyncio.timeout(WAIT_S):
        while len(name_of) < count:
            await asyncio.sleep(0.05)
            spans = exporter.get_finished_spans()
            requests = [span for span in spans if span.name == "crossdock.request"]
            name_of = {
                span.context.trace_id: span.attributes["crossdock.request_id"] for span in requests
            }
    made = {name_of[span.context.trace_id]: Traced(span, {}, [], []) for span in requests}
    for span in sorted(exporter.get_finished_spans(), key=lambda span: span.start_time):
        one = made[name_of[span.context.trace_id]]
        events = {event.name: event.timestamp / 1e9 for event in span.events}
        if span.name in (*TTFT_STAGES, *STALL_STAGES):
            one.stages[span.name] = (span.end_time - span.start_time) / 1e9
        elif span.name == "crossdock.prefill":
            one.prefills.append(events)
        elif span.name == "crossdock.decode":
            one.decodes.append(events)
    return made


# -- the two identities --------------------------------------------------------------------------


def check_ttft(name: str, one: Traced, seen: Seen) -> None:
    parts = sum(one.stages[stage] for stage in TTFT_STAGES)
    assert parts == pytest.approx(one.first_token - one.received, abs=MS), name
    worker = next(each for each in one.prefills if "first_token" in each)
    # The client's clock and the worker's, around the gateway's.
    in_order = [seen.sent, one.received, one.event("admitted"), one.event("routed")]
    in_order += [worker["prefill_queued"], worker["prefill_started"], worker["first_token"]]
    in_order += [one.first_token, seen.at[0]]
    assert_ordered(name, in_order)
    expected = {
        "admission": one.event("admitted") - one.received,
        "routing": one.event("routed") - one.event("admitted"),
        "prefill_queue": worker["prefill_started"] - one.event("routed"),
        "prefill": worker["first_token"] - worker["prefill_started"],
        "delivery": one.first_token - worker["first_token"],
    }
    if len(one.prefills) == 1:
        assert_equal(name, one.stages, expected)


def check_stall(name: str, one: Traced, seen: Seen) -> None:
    if one.handed_off and not seen.together:
        assert one.second_token <= seen.at[1] + MS, name
    if one.restarted_between:
        assert len(one.prefills) > 1, name
        return
    worker = next(each for each in one.decodes if "fenced" in each)
    marks = [worker[e] for e in ("decode_queued", "reserved", "pulled", "fenced", "joined")]
    assert_ordered(name, [*marks, one.second_token])
    assert_ordered(name, [one.first_token, worker["joined"]])  # token 0 waited for no KV
    # What was over before token 0 was delivered is no part of the stall.
    after = [max(one.first_token, mark) for mark in marks[:4]]
    steps = [one.first_token, *after, one.second_token]
    lengths = [end - begin for begin, end in pairwise(steps)]
    assert_equal(name, one.stages, dict(zip(STALL_STAGES, lengths, strict=True)))
    assert sum(lengths) == pytest.approx(one.second_token - one.first_token, abs=MS)


def assert_ordered(name: str, times: list[float]) -> None:
    assert all(b - a > -MS for a, b in pairwise(times)), (name, times)


def assert_equal(name: str, found: dict[str, float], expected: dict[str, float]) -> None:
    off = {s: (found[s], value) for s, value in expected.items() if abs(found[s] - value) > MS}
    assert not off, (name, off)


async def test_both_identities_hold_for_1000_requests(
    tiny_model: Path, exporter: InMemorySpanExporter
) -> None:
    roles = [Role.PREFILL] * 2 + [Role.DECODE] * 2
    cluster = await start(tiny_model, roles, chunk_tokens=CHUNK)
    asking, seen = asyncio.Semaphore(AT_ONCE), {}

    def disturb(index: int) -> None:
        """Sends what runs on a decode worker back to prefill."""
        error = worker_pb2.ERROR_CODE_PREEMPTED
        cluster.workers[2 + index % 2].post(lambda role: role.eject_all(error, "planted"))

    async def one(index: int) -> None:
        """A quarter share long prefixes, a tenth are of several chunks and share nothing."""
        length = 300 if index % 10 == 0 else 20 + index % 40
        own = [3 + (index * 7 + j * (1 + index // 190)) % 190 for j in range(length)]
        prefix = [5 + index % 3] * 160 if index % 4 == 0 else []
        async with asking:
            name = f"r{index}"
            seen[name] = await ask(cluster, name, prefix + own, 2 + index % 5)
        if index % 15 == 0:
            disturb(index // 15)

    try:
        await asyncio.gather(*(one(index) for index in range(REQUESTS)))
        await cluster.settled()
    finally:
        await stop(cluster)
    found = await traced(exporter, REQUESTS)
    kinds: Counter[str] = Counter()
    for name, each in found.items():
        check_ttft(name, each, seen[name])
        check_stall(name, each, seen[name])
        kinds["restarted"] += len(each.prefills) > 1
        kinds["handed off at once"] += not each.restarted_between
        kinds["found a prefix"] += seen[name].cached >= 128
        kinds["tokens 0 and 1 seen apart"] += not seen[name].together
    assert len(found) == REQUESTS
    # All kinds were among them.
    assert kinds["restarted"] and kinds["found a prefix"] >= 100, kinds
    assert kinds["handed off at once"] > REQUESTS // 2, kinds
    assert kinds["tokens 0 and 1 seen apart"] > REQUESTS // 2, kinds


# -- delays planted in one stage ------------------------------------------------------------------


class Gate:
    """Holds up whoever comes first: until the client has token 0, if it is to, and DELAY_S more."""

    def __init__(self, stage: str) -> None:
        self.token_0 = threading.Event()
        self.passed = False
        if stage in TTFT_STAGES:
            self.token_0.set()

    def hold(self) -> None:
        if not self.passed:
            self.passed = True
            assert self.token_0.wait(WAIT_S), "token 0 waits for what is held up"
            time.sleep(DELAY_S)

    def posted_late(self, post: Callable[[], Handle]) -> Handle:
        """A transport's read that begins only when it may."""
        handle = Handle()

        def run() -> None:
            self.hold()
            real = post()
            while not real.terminal:
                time.sleep(0.001)
            if real.state is HandleState.DONE:
                handle.finish(real.generations)
            else:
                handle.fail(str(real.error))

        threading.Thread(target=run, daemon=True).start()
        return handle


def plant(stage: str, cluster: Cluster, gate: Gate, patch: pytest.MonkeyPatch) -> None:
    """Delays one stage, once."""
    prefill, decode = cluster.workers
    gateway: Any = cluster.gateway

    def around(owner: Any, method: str, then: Callable[..., Any]) -> None:
        real = getattr(owner, method)
        patch.setattr(owner, method, lambda *arguments: then(real, *arguments))

    def before(real: Callable[..., Any], *arguments: Any) -> Any:
        gate.hold()
        return real(*arguments)

    def after(real: Callable[..., Any], *arguments: Any) -> None:
        real(*arguments)
        gate.hold()

    def meanwhile(real: Callable[..., Any], *arguments: Any) -> None:
        held = asyncio.ensure_future(asyncio.to_thread(gate.hold))
        held.add_done_callback(lambda _: real(*arguments))

    def with_tokens(real: Callable[..., Any], turn: Any) -> None:
        if turn.outputs:
            gate.hold()
        real(turn)

    def read_late(real: Callable[..., Any], *arguments: Any) -> Handle:
        if len(arguments[1]) == 0:  # remote ids: a release alone
            return real(*arguments)
        return gate.posted_late(lambda: real(*arguments))

    def take_all_blocks(role: Any) -> None:
        taken = role.state.pool.allocate(role.state.pool.num_available)

        def give_back() -> None:
            gate.hold()
            decode.post(lambda role: role.state.pool.release(taken))

        threading.Thread(target=give_back, daemon=True).start()

    if stage == "admission":
        around(type(gateway._models.default.text), "encode", before)
    elif stage == "routing":
        around(gateway._models.default.dispatcher, "_policy", before)
    elif stage == "prefill_queue":
        around(prefill._role, "_admit", after)
    elif stage == "prefill":
        around(prefill._loop._runner, "run", before)
    elif stage == "delivery":
        around(prefill._loop, "_publish", with_tokens)
    elif stage == "decode_queue":
        around(decode.peers, "ensure", meanwhile)
    elif stage == "reserve":
        decode.post(take_all_blocks)
    elif stage == "pull":
        around(decode._transport, "read_blocks", read_late)
    elif stage == "fence":
        around(decode._transport, "read_generations", read_late)
    elif stage == "first_step":
        around(decode._loop._runner, "run", before)


@pytest.mark.parametrize("stage", [*TTFT_STAGES, *STALL_STAGES])
async def test_a_delay_is_found_in_its_stage_and_by_the_client(
    pair: Cluster, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Whatever holds up the hand-off, token 0 is with the client before: the gate waits for it."""
    gate = Gate(stage)
    plant(stage, pair, gate, monkeypatch)
    seen = await ask(pair, "r", "A crossdock is a terminal.", 3, lambda n: gate.token_0.set())
    assert gate.passed
    await pair.settled()
    one = (await traced(exporter, 1))["r"]
    check_ttft("r", one, seen)
    check_stall("r", one, seen)
    assert one.stages[stage] >= DELAY_S - MS, one.stages
    whole = seen.at[0] - seen.sent if stage in TTFT_STAGES else seen.at[1] - seen.at[0]
    assert whole >= DELAY_S
    told = (one.first_token - one.received, one.second_token - one.first_token)
    assert told[stage in STALL_STAGES] >= DELAY_S - MS
