"""The audit log: one line for each request, and what is found where lines are not as written."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from access_kit import Doors, bearer, complete, generate, start_doors
from audit_kit import SEED, make
from gateway_rig import Rig, until
from prometheus_client import CollectorRegistry
from responses_kit import client_of

from crossdock.audit_replay import replay
from crossdock.client import Client
from crossdock.proto.errors import InvalidRequest, NotFound, Unavailable
from crossdock.router.config import AuditSettings
from crossdock.router.dispatch.request import Ended
from crossdock.router.frontdoor.audit import MAX_PENDING, MAX_REFUSED, AuditLog
from crossdock.router.frontdoor.audit_chain import find_request, in_order, verify
from crossdock.router.frontdoor.audit_refusals import MAX_KINDS, SEPARATE, SPAN_S, Refusals


@pytest.fixture
async def doors(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Doors]:
    audit = AuditSettings(file=str(tmp_path / "audit"), prompts="keep")
    async with start_doors(tiny_model, tmp_path, audit=audit) as made:
        yield made


def log_of(tmp_path: Path) -> Path:
    return tmp_path / "audit.gateway-0"


def requests_in(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in in_order([file]) for line in path.open()]
    return [line for line in lines if line["kind"] == "request"]


def refused_in(file: Path) -> list[dict[str, Any]]:
    """The lines that count refused requests."""
    lines = [json.loads(line) for path in in_order([file]) for line in path.open()]
    return [line for line in lines if line["kind"] == "refused"]


async def written(rig: Rig, count: int) -> None:
    await until(lambda: rig.metric("audit_lines_total", result="written") >= count)


# -- the file -------------------------------------------------------------------------------------


async def test_a_rotation_that_fails_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    settings = AuditSettings(file=str(tmp_path / "log"), rotate_mb=0.001)
    log = AuditLog(settings, "g", SEED, CollectorRegistry())
    real = os.open

    def none_left(path: Any, *more: Any, **named: Any) -> int:
        if path == log.path:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", none_left)
        for i in range(20):
            log.add({"id": f"r{i}"})
            await log._flush()
        log.check()
    log.add({"id": "r20"})
    await log._flush()
    await log.close()
    files = in_order([log.path])
    assert len(files) == 2 and not verify(files).wrong
    assert [line["id"] for line in requests_in(log.path)] == [f"r{i}" for i in range(21)]


async def test_a_line_that_a_crash_left_unfinished_is_taken_off(tmp_path: Path) -> None:
    file = await make(tmp_path, 5)
    with file.open("ab") as opened:
        opened.write(b'{"n":99,"pr')
    await make(tmp_path, 5)
    found = verify([file])
    assert not found.wrong and found.requests == 10
    opened_lines = [json.loads(line) for line in file.open() if '"opened"' in line]
    assert [line["lost"] for line in opened_lines] == [0, 11]


async def test_two_gateways_never_write_one_file(tmp_path: Path) -> None:
    settings = AuditSettings(file=str(tmp_path / "log"))
    first = AuditLog(settings, "g", SEED, CollectorRegistry())
    with pytest.raises(Exception, match="written by another gateway"):
        AuditLog(settings, "g", SEED, CollectorRegistry())
    first.start()
    await first.close()


# -- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_full", ["refuse", "drop"])
async def test_a_full_disk(tmp_path: Path, monkeypatch: Any, caplog: Any, on_full: Any) -> None:
    registry = CollectorRegistry()
    log = AuditLog(AuditSettings(file=str(tmp_path / "log"), on_full=on_full), "g", SEED, registry)
    real, calls = os.write, 0

    def full(fd: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls % 2:  # a part of it is written
            return real(fd, bytes(data[:50]))
        raise OSError(errno.ENOSPC, "No space left on device")

    log.add({"id": "before"})
    await log._flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for i in range(3):
            log.add({"id": f"during{i}"})
            await log._flush()
        if on_full == "refuse":
            with pytest.raises(Unavailable, match="No space left"):
                log.check()
        else:
            log.check()
    assert len([r for r in caplog.records if "No space left" in r.message]) == 1
    log.add({"id": "after"})
    await log._flush()
    log.check()
    log.start()
    await log.close()
    assert not verify([log.path]).wrong
    ids = [line["id"] for line in requests_in(log.path)]
    dropped = registry.get_sample_value("crossdock_audit_lines_total", {"result": "dropped"})
    if on_full == "refuse":
        assert ids == ["before", "during0", "during1", "during2", "after"]
        assert not dropped
    else:
        assert ids == ["before", "after"]
        assert dropped == 3
        told = [json.loads(line) for line in log.path.open() if '"dropped"' in line]
        assert [line["count"] for line in told] == [3]


async def test_a_disk_that_hangs_is_as_good_as_full(tmp_path: Path) -> None:
    """What was refused meanwhile takes no room from what was served."""
    log = AuditLog(AuditSettings(file=str(tmp_path / "log")), "g", SEED, CollectorRegistry())
    log.check()
    for i in range(MAX_PENDING):
        log.add({"id": f"refused{i}", "ended": None})
    with pytest.raises(Unavailable, match="waits for its disk"):
        log.check()
    log.add({"id": "served", "ended": Ended(None, 1.0, 1, [])})
    await log._flush()
    log.check()
    await log.close()
    ids = [line["id"] for line in requests_in(log.path)]
    assert len(ids) == MAX_REFUSED and ids[-1] == "served"


async def test_a_gateway_refuses_what_it_could_not_write_down(
    doors: Doors, monkeypatch: Any
) -> None:
    key = doors.key("acme")
    await doors.known(key)

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert (await complete(doors.rig, key)).status == 200
        audit = doors.rig.gateway._gate._audit
        assert audit is not None
        await until(lambda: audit._full)
        refused = await complete(doors.rig, key)
        assert refused.status == 503
        assert "audit log" in refused.error["message"]
    await until(lambda: not audit._full)
    assert (await complete(doors.rig, key)).status == 200


# -- a gateway -------------------------------------------------------------------------------------


async def test_every_request_has_one_line_whatever_its_end(doors: Doors, tmp_path: Path) -> None:
    key = doors.key("acme", limits={"requests_per_minute": 6})
    await doors.known(key)
    rig = doors.rig
    headers = {"X-Approval-Id": "change-17", "X-Request-Id": "the-first"}
    assert (await complete(rig, key, headers, n=2, temperature=0.5)).status == 200
    assert (await complete(rig, key, stream=True)).status == 200
    assert (await complete(rig, key, top_p=7)).status == 400
    assert (await complete(rig, key, headers={"X-Crossdock-Tenant": "other"})).status == 403
    await generate(rig, key)
    rig.prefills[0].gate.clear()
    url, body = f"{rig.url}/v1/completions", {"prompt": [5] * 40}
    async with aiohttp.ClientSession(headers=bearer(key)) as session:
        gone = asyncio.create_task(session.post(url, json=body))
        await until(lambda: rig.metric("active_sequences") == 1)
        gone.cancel()
    await until(lambda: rig.idle)
    rig.prefills[0].gate.set()
    assert (await complete(rig, key)).status == 429
    await written(rig, 7)
    lines = requests_in(log_of(tmp_path))
    outcomes = ["ok", "ok", "invalid", "forbidden", "ok", "cancelled", "rate_limited"]
    assert [line["outcome"] for line in lines] == outcomes
    assert {line["tenant"] for line in lines} == {"acme"}
    assert {line["key"] for line in lines} == {key.split("-")[1]}
    first = lines[0]
    assert (first["id"], first["approval"]) == ("the-first", "change-17")
    assert first["parameters"]["temperature"] == 0.5
    assert first["parameters"]["seed"]
    assert first["prompts"][0]["token_ids"] == list(range(10, 50))
    assert [choice["token_ids"] for choice in first["choices"]] == [[10, 11]] * 2
    assert first["choices"][0]["prefill_worker"] == "prefill-0"
    assert first["choices"][0]["events"]["finished"] > 0
    assert not verify([log_of(tmp_path)]).wrong


async def test_prompts_are_hashed_unless_they_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    audit = AuditSettings(file=str(tmp_path / "audit"))
    async with start_doors(tiny_model, tmp_path, audit=audit) as doors:
        key = doors.key("acme")
        await doors.known(key)
        assert (await complete(doors.rig, key)).status == 200
        assert (await complete(doors.rig, key)).status == 200
    first, second = requests_in(log_of(tmp_path))
    assert "token_ids" not in json.dumps(first)
    assert first["prompts"] == second["prompts"]
    assert first["prompts"][0]["tokens"] == 40
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="was not kept"):
        replay(first, client, 1.0)


async def test_a_replay_computes_the_same_tokens(doors: Doors, tmp_path: Path) -> None:
    key = doors.key("acme")
    await doors.known(key)
    rig = doors.rig
    for i in range(10):
        prompts = [[10 + i] * 20, list(range(10, 40))]
        headers = {"X-Request-Id": f"r{i}"}
        answer = await complete(rig, key, headers, prompt=prompts, n=2, max_tokens=5)
        assert answer.status == 200
    await written(rig, 10)
    files = in_order([log_of(tmp_path)])
    with Client(rig.gateway.grpc_address, api_key=key) as client:
        for i in range(10):
            line = find_request(files, f"r{i}")
            assert await asyncio.to_thread(replay, line, client, 10.0) == []
        line["choices"][3]["token_ids"][2] += 1
        found = await asyncio.to_thread(replay, line, client, 10.0)
        assert found == ["choice 3: differs from token 2 on"]
    with pytest.raises(NotFound):
        find_request(files, "nothing")


async def test_a_refusal_does_not_hide_what_was_served_under_its_id(
    doors: Doors, tmp_path: Path
) -> None:
    """As of a client that names each try the same."""
    key = doors.key("acme", limits={"max_concurrent": 1})
    await doors.known(key)
    headers = {"X-Request-Id": "again"}
    assert (await complete(doors.rig, key, headers, n=2)).status == 400
    assert (await complete(doors.rig, key, headers)).status == 200
    assert (await complete(doors.rig, key, headers, n=2)).status == 400
    await written(doors.rig, 3)
    line = find_request(in_order([log_of(tmp_path)]), "again")
    assert line["outcome"] == "ok"


async def test_of_an_id_that_two_tenants_use_either_is_found(doors: Doors, tmp_path: Path) -> None:
    for tenant in ("acme", "bolt"):
        key = doors.key(tenant)
        await doors.known(key)
        assert (await complete(doors.rig, key, {"X-Request-Id": "same"})).status == 200
    await written(doors.rig, 2)
    files = in_order([log_of(tmp_path)])
    assert [find_request(files, "same", of)["tenant"] for of in ("acme", "bolt", None)] == [
        *("acme", "bolt", "bolt")
    ]
    with pytest.raises(NotFound, match="'same' of tenant 'cord'"):
        find_request(files, "same", "cord")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_found_by_its_id(doors: Doors, tmp_path: Path, stream: bool) -> None:
    key = doors.key("acme")
    await doors.known(key)
    headers = {"Authorization": f"Bearer {key}"}
    async with client_of(doors.rig, **headers) as client:
        asked = {"model": "", "input": "hi", "max_output_tokens": 4}
        if stream:
            events = [each async for each in await client.responses.create(**asked, stream=True)]
            made = events[-1].response
        else:
            made = await client.responses.create(**asked)
    await written(doors.rig, 1)
    line = find_request(in_order([log_of(tmp_path)]), made.id)
    assert (line["response"], line["choices"][0]["tokens"]) == (made.id, 4)


async def test_who_is_refused_all_the_time_does_not_fill_the_disk(
    tiny_model: Path, tmp_path: Path
) -> None:
    audit = AuditSettings(file=str(tmp_path / "audit"))
    async with start_doors(tiny_model, tmp_path, audit=audit) as doors:
        key = doors.key("acme", limits={"requests_per_minute": 1})
        other = doors.key("other")
        await doors.known(other)
        answers = await asyncio.gather(*(complete(doors.rig, key) for _ in range(40)))
        assert sorted(answer.status for answer in answers) == [200] + [429] * 39
        assert (await complete(doors.rig, other, top_p=5)).status == 400
    file = log_of(tmp_path)
    assert not verify(in_order([file])).wrong
    told = [(line["tenant"], line["outcome"]) for line in requests_in(file)]
    assert told.count(("acme", "ok")) == told.count(("other", "invalid")) == 1
    assert told.count(("acme", "rate_limited")) == SEPARATE
    [line] = refused_in(file)
    assert (line["tenant"], line["outcome"], line["count"]) == ("acme", "rate_limited", 29)


def test_refusals_are_counted_for_a_minute_and_told_then() -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])

    def refused(tenant: str, outcome: str = "invalid") -> bool:
        return refusals.separate({"tenant": tenant, "outcome": outcome, "time": now[0]})

    assert [refused("a") for _ in range(SEPARATE + 2)] == [True] * SEPARATE + [False] * 2
    assert refused("b") and refused("a", "overloaded"), "each by itself"
    now[0] = SPAN_S - 1
    assert not refused("a") and not refusals.told()
    now[0] = SPAN_S
    [line] = refusals.told()
    assert (line["tenant"], line["count"], line["since"], line["time"]) == ("a", 3, 0, SPAN_S - 1)
    assert refused("a"), "of the next minute"
    for i in range(2 * MAX_KINDS):
        refused(f"tenant {i}")
    assert not refused("one more")
    others = refusals.told(everything=True)
    assert [(line["tenant"], line["outcome"]) for line in others] == [("", "invalid")]
    assert refusals.told(everything=True) == []


async def test_one_line_each_under_chaos(tiny_model: Path, tmp_path: Path) -> None:
    """Streams break, workers refuse, clients go away; each request has its one line, but for those
    of which nothing was started."""
    audit = AuditSettings(file=str(tmp_path / "audit"), rotate_mb=0.2)
    counts: dict[str, Any] = {"prefills": 2, "decodes": 2, "chunk_tokens": 64, "max_batch": 8}
    async with start_doors(tiny_model, tmp_path, audit=audit, **counts) as doors:
        key, rng, rig = doors.key("acme"), random.Random(8), doors.rig
        await doors.known(key)
        room = asyncio.Semaphore(24)

        async def one(session: aiohttp.ClientSession, i: int) -> None:
            body = {"prompt": [7 + i % 100] * rng.choice([3, 40]), "max_tokens": 4}
            body |= rng.choice([{}, {}, {"n": 2}, {"top_p": 5}, {"stream": True}])  # type: ignore[arg-type]
            async with room:
                asked = session.post(
                    f"{rig.url}/v1/completions", json=body, headers={"X-Request-Id": f"r{i}"}
                )
                patience = rng.choice([None, None, None, 0.02])
                with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                    async with asyncio.timeout(patience), asked as response:
                        await response.read()

        async def faults() -> None:
            while True:
                await asyncio.sleep(0.05)
                worker = rng.choice(rig.workers)
                rng.choice([worker.break_streams, partial(worker.refusals.append, 2)])()

        faulty = asyncio.create_task(faults())
        async with aiohttp.ClientSession(headers=bearer(key)) as session:
            await asyncio.gather(*(one(session, i) for i in range(300)))
        faulty.cancel()
        await until(lambda: rig.idle)
    file = log_of(tmp_path)
    lines = requests_in(file)
    assert not verify(in_order([file])).wrong
    ids = [line["id"] for line in lines if "id" in line]
    assert len(ids) == len(set(ids)), "a request has two lines"
    seen = sum(rig.metric("requests_total", outcome=o) for o in {e["outcome"] for e in lines})
    counted = sum(line["count"] for line in refused_in(file))
    assert len(lines) + counted == seen, "each is in a line, once"
    assert counted and all(line["outcome"] != "ok" for line in refused_in(file))
    assert {"ok", "cancelled", "invalid"} <= {line["outcome"] for line in lines}
