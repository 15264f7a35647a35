"""What a listener is told of requests, and that it is told before they go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_rig import ask, collect, start_rig, until
from roles_kit import Site, job

from crossdock.deploy.telemetry import EVENT_LISTENER, event_listener
from crossdock.prefill import role as prefill_worker
from crossdock.proto import events
from crossdock.proto.errors import ConfigError
from crossdock.proto.types import LIFE_CYCLE, Role
from crossdock.worker.config import WorkerConfig

PROMPT = [(7 * i) % 900 + 3 for i in range(50)]
Told = list[tuple[str, str, str]]


@pytest.fixture
def told() -> Iterator[Told]:
    """All that was emitted, in its order."""
    found: Told = []
    events.listen(lambda *event: found.append(event))
    yield found
    events.listen(None)


def test_nobody_is_told_unless_somebody_listens(told: Told) -> None:
    events.emit("joined", "s-1", "cafe")
    events.listen(None)
    events.emit("joined", "s-2")
    events.listen(lambda *event: told.append(event))
    events.emit("joined", "s-3")
    assert told == [("joined", "s-1", "cafe"), ("joined", "s-3", "-")]


async def test_a_gateway_tells_what_a_request_lives_through(tiny_model: Path, told: Told) -> None:
    async with start_rig(tiny_model) as rig:
        facts = [rig.prefills[0], rig.decodes[0]]
        assert sorted(told) == sorted(("connected", w.name, w.incarnation.hex()) for w in facts)
        told.clear()
        await collect(rig.stub.Generate(ask(max_tokens=3)))
        await until(lambda: rig.idle)
        request, held = told[0][1], [d for e, _, d in told if e == "held"]
        assert [name.partition("@")[2] for name in held] == ["prefill-0", "decode-0"]
        assert sorted(d for e, _, d in told if e == "released") == sorted(held)
        assert {who for _, who, _ in told} == {request}
        names = [e for e, _, _ in told if e not in ("held", "released")]
        assert names == ["received", "admitted", "routed", "delivered", "last_token", "finished"]
        told.clear()
        await rig.gateway.update_members([])
        await until(lambda: len(told) == 2)
    assert {(e, who) for e, who, _ in told} == {
        ("disconnected", "prefill-0"),
        ("disconnected", "decode-0"),
    }


def test_workers_tell_each_event_once_and_of_the_fence_before_it_is_posted(told: Told) -> None:
    site = Site()
    p, d = site.worker(Role.PREFILL), site.worker(Role.DECODE)
    site.introduce(p, d)
    made = job(PROMPT)
    p.role.submit(made)
    while made.id in p.role.jobs:
        p.turn()
    outputs = p.take()
    first = next(output for output in outputs if output.token_ids)
    announced = (output.progress for output in outputs if output.HasField("progress"))
    offered = next(each.ticket for each in announced if each.HasField("ticket"))
    first.progress.ticket.CopyFrom(offered)
    reader = job(PROMPT, emitted=list(first.token_ids), progress=first.progress)
    fences: list[list[str]] = []
    read = d.role.state.transport.read_generations

    def fence(*arguments):
        fences.append([event for event, _, _ in told])
        return read(*arguments)

    d.role.state.transport.read_generations = fence
    d.role.submit(reader)
    d.turn(12)
    ticket = offered.ticket_id.hex()
    names = [event for event, _, _ in told]
    assert names == [event for event in LIFE_CYCLE if event in names]
    assert set(LIFE_CYCLE) - set(names) == {"admitted", "routed", "finished"}
    assert [seen[-1] for seen in fences] == ["pulled"]
    assert ("ticket_offered", made.id, ticket) in told
    assert ("decode_queued", reader.id, ticket) in told
    assert {who for event, who, _ in told if event in ("pulled", "fenced")} == {ticket}


async def test_a_worker_tells_that_it_has_started(tiny_model: Path, told: Told) -> None:
    settings = {"kv_memory_mb": 16, "transport": "local", "cluster_key": b"a key of this cluster"}
    config = WorkerConfig(name="p", pool="p", role=Role.PREFILL, model=str(tiny_model), **settings)
    worker = prefill_worker.create(config)
    endpoint = await worker.start()
    await worker.stop()
    assert told == [("started", "p", f"prefill@{endpoint.incarnation}")]


@pytest.mark.parametrize("named", ["", None])
def test_a_process_has_no_listener_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    if named is None:
        monkeypatch.delenv(EVENT_LISTENER, raising=False)
    else:
        monkeypatch.setenv(EVENT_LISTENER, named)
    assert event_listener() is None


def test_a_listener_is_named_as_module_and_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVENT_LISTENER, "crossdock.proto.events:emit")
    assert event_listener() is events.emit


@pytest.mark.parametrize("named", ["no_such_module:f", "os:no_such_function", "a b"])
def test_a_listener_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv(EVENT_LISTENER, named)
    with pytest.raises(ConfigError, match=f"CROSSDOCK_EVENT_LISTENER.*{named!r}"):
        event_listener()
