"""What the comparison of front ends counts and judges, on figures worked out by hand."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT, END = b"8\r\ndata: x\n\n\r\n", b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def stat_of(pid: int, name: str, parent: int, *ticks: int) -> str:
    utime, stime, cutime, cstime = ticks
    before, after = "S {} 1 1 0 -1 4194304 9 9 9 9", "20 0 5 0 777 1000 100"
    return f"{pid} ({name}) {before.format(parent)} {utime} {stime} {cutime} {cstime} {after}\n"


def test_a_stat_is_read_whatever_the_process_is_called() -> None:
    from gateway_peer import TICKS, Stat, parse_stat

    assert parse_stat(stat_of(41, "a) R 7 (b", 40, 5, 6, 70, 800)) == Stat(41, 40, 881 / TICKS)


def test_a_process_counts_with_its_descendants_and_no_others() -> None:
    from gateway_peer import Stat, cpu_s_of

    stats = [Stat(10, 1, 1.0), Stat(13, 12, 8.0), Stat(12, 10, 4.0), Stat(20, 1, 2.0)]
    assert cpu_s_of(stats, [10]) == 13.0
    assert cpu_s_of(stats, [12]) == 12.0
    assert cpu_s_of(stats, [10, 12, 20]) == 15.0
    with pytest.raises(ProcessLookupError, match="process 11 is not there"):
        cpu_s_of(stats, [10, 11])


def test_this_process_has_taken_what_the_system_says() -> None:
    from gateway_peer import TICKS, cpu_s_of, running

    before = time.process_time()
    assert cpu_s_of(running(), [os.getpid()]) >= before - 2 / TICKS


def test_perf_counts_or_says_why_not() -> None:
    from gateway_peer import parse_perf

    assert parse_perf("# started\n123456,,instructions:u,99,100.00,,\n") == 123456
    for text in ("<not supported>,,instructions:u,0,100.00,,", "perf: no permission"):
        with pytest.raises(ValueError):
            parse_perf(text)


def test_ratios_are_of_one_round_and_of_the_medians() -> None:
    from gateway_peer import Round, compared

    ours = [Round(cpu, 66, 5.0, 9.0) for cpu in (4.0, 6.0, 5.0)]
    theirs = [Round(cpu, 66, 5.0, 3.0) for cpu in (2.0, 2.0, 4.0)]
    assert compared(ours, theirs) == {
        "ratio_of_medians": 2.5,
        "least_ratio": 1.25,
        "greatest_ratio": 3.0,
        "ratio_of_instructions": 3.0,
    }
    assert "ratio_of_instructions" not in compared([Round(4.0, 66, 5.0)], theirs[:1])


def test_texts_are_of_so_many_words_and_never_alike() -> None:
    from gateway_peer import Load

    load = Load("m", 8, 4, 64, 200)
    texts = [load.body(number)["messages"][0]["content"] for number in range(-3, 40)]
    assert {len(text.split()) for text in texts} == {200}
    assert len(set(texts)) == len(texts)
    assert load.packed(5) == load.packed(5) != load.packed(6)


@asynccontextmanager
async def front(answer: Callable[[asyncio.StreamWriter], Any]) -> AsyncIterator[str]:
    """An HTTP server that answers each request so; its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2]))
                await answer(writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())


async def whole(writer: asyncio.StreamWriter) -> None:
    for piece in (HEAD, EVENT + EVENT[:6], EVENT[6:] + END[:7], END[7:]):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)


async def refused(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy")


async def cut(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + EVENT)
    writer.close()


async def failed(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + EVENT + b"0\r\n\r\n")


async def test_a_client_counts_events_and_keeps_its_connections() -> None:
    from gateway_peer import Front, Load, send

    async with front(whole) as url:
        assert await send(Front("f", url, ()), Load("m", 7, 3, 2, 5), 0) == 7 * 3


@pytest.mark.parametrize(
    "answer, why", [(refused, "429"), (cut, "closed"), (failed, "its stream ended")]
)
async def test_an_answer_that_is_no_whole_stream_ends_the_run(
    answer: Callable[[asyncio.StreamWriter], Any], why: str
) -> None:
    from gateway_peer import Front, Load, send

    async with front(answer) as url:
        with pytest.raises(ExceptionGroup) as raised:
            await send(Front("f", url, ()), Load("m", 1, 1, 2, 5), 0)
    [error] = raised.value.exceptions
    assert isinstance(error, ConnectionError) and why in str(error)
