"""A gateway, a client or a peer that is lost while requests are in every stage: within 5 s nothing
of theirs is held anywhere, although no new work arrives. Real processes, NIXL over TCP."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from process_kit import Cluster, WorkerProcess, until

from crossdock.client import AsyncClient
from crossdock.proto.errors import CrossdockError

FREED_S = 5.0
WAIT_S = 60.0
REQUESTS = 16
TOKENS = 200
PACE_S = 0.05
# Between two requests: a worker that was just not heard of in time gets none that come at once.
GAP_S = 0.1

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_model, kv_memory_mb=8, chunk_tokens=32, transport_options={"TLS": "tcp"})
    yield cluster
    cluster.close()


def prompt_of(index: int, salt: int) -> list[int]:
    """Some 100 to 200 tokens; two of one salt, or of two salts, have no block in common."""
    return [salt, *((index * 13 + j * (index + 3)) % 190 + 3 for j in range(100 + 6 * index))]


class Held:
    """Holds requests in every stage: prompts half computed, offers open, reads begun, decoding."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        cluster.everywhere(pace_s=PACE_S)
        for worker in cluster.of("prefill"):  # whichever is chosen, prompts last
            worker.ask(pace_s=0.25)
        cluster.workers["decode-1"].ask(reads=False)

    def wait(self) -> None:
        """Returns once every stage has some."""
        try:
            until(self._seen, WAIT_S, "requests in every stage")
        except AssertionError as error:
            loads = {name: w.status().load for name, w in self._cluster.workers.items()}
            raise AssertionError(f"{error}: {loads}") from None

    def _seen(self) -> bool:
        prefills = [worker.status() for worker in self._cluster.of("prefill")]
        decodes = {name: w.status() for name, w in self._cluster.workers.items()}
        return (
            any(status.load.queued_tokens for status in prefills)
            and any(status.leases for status in prefills)
            and decodes["decode-0"].load.running > 0
            and decodes["decode-1"].load.waiting > 0
        )

    def resume(self, pace_s: float = PACE_S) -> None:
        """At this pace of a step, TOKENS of them do not end by themselves within FREED_S."""
        self._cluster.everywhere(pace_s=pace_s, reads=True)


class Clients:
    """gRPC clients with one request each, whatever becomes of it."""

    def __init__(self, target: str, salt: int) -> None:
        self._client = AsyncClient(target)
        prompts = [prompt_of(index, salt) for index in range(REQUESTS)]
        self._tasks = [asyncio.create_task(self._one(*each)) for each in enumerate(prompts)]

    async def _one(self, index: int, prompt: list[int]) -> list[int] | CrossdockError:
        await asyncio.sleep(index * GAP_S)
        try:
            answer = await self._client.generate(
                prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True, timeout=WAIT_S
            )
            return list(answer.token_ids)
        except CrossdockError as error:
            return error

    async def ends(self) -> list[list[int] | CrossdockError]:
        ended = await asyncio.gather(*self._tasks)
        await self._client.close()
        return ended


async def freed(cluster: Cluster, since: float) -> None:
    await asyncio.to_thread(cluster.freed_within, FREED_S, since)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_lost_gateway_leaves_nothing_behind(cluster: Cluster, how: str) -> None:
    """Killed, its sockets close; stopped, they stay open, and keepalive finds out."""
    target = await asyncio.to_thread(cluster.start_gateway)
    held = await asyncio.to_thread(Held, cluster)
    clients = Clients(target, 5 if how == "killed" else 6)
    await asyncio.to_thread(held.wait)
    gateway = cluster.gateways[-1]
    gateway.signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    lost = time.monotonic()
    await asyncio.to_thread(held.resume)
    await freed(cluster, lost)
    gateway.end()
    assert all(isinstance(end, CrossdockError) for end in await clients.ends())


async def test_clients_that_close_their_sockets_leave_nothing_behind(cluster: Cluster) -> None:
    """At each stage of a stream: nothing yet, half the prompt, token 0, in the middle."""
    await asyncio.to_thread(cluster.start_gateway)
    held = await asyncio.to_thread(Held, cluster)
    sockets = []
    for index in range(REQUESTS):
        sockets.append(post(cluster.http, prompt_of(index, 7)))
        await asyncio.sleep(GAP_S)
    await asyncio.to_thread(held.wait)
    for each in sockets:
        each.close()
    closed = time.monotonic()
    await asyncio.to_thread(held.resume)
    await freed(cluster, closed)


def post(address: str, prompt: list[int]) -> socket.socket:
    """A streaming request on a socket of its own, whose answer nobody reads."""
    body = json.dumps({"model": "", "prompt": prompt, "max_tokens": 1500, "stream": True})
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=WAIT_S)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return sock


@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
async def test_a_peer_killed_in_the_middle_leaves_nothing_behind(
    cluster: Cluster, victim: str
) -> None:
    """Every request goes on elsewhere with the same tokens; the rest of the cluster is clean."""
    target = await asyncio.to_thread(cluster.start_gateway)
    held = await asyncio.to_thread(Held, cluster)
    salt = 8 if victim == "prefill-1" else 9
    clients = Clients(target, salt)
    await asyncio.to_thread(held.wait)
    await asyncio.to_thread(cluster.kill, victim)
    await asyncio.to_thread(held.resume, 0.0)
    tokens = await clients.ends()
    await freed(cluster, time.monotonic())
    assert tokens == await Clients(target, salt).ends()
    assert all(len(each) == TOKENS for each in tokens if isinstance(each, list))
    await asyncio.to_thread(cluster.start_workers, victim)


async def test_token_0_reaches_the_client_before_any_kv_moves(cluster: Cluster) -> None:
    """The decode workers are stopped: token 0 comes all the same, and nothing but it."""
    target = await asyncio.to_thread(cluster.start_gateway)
    decodes: list[WorkerProcess] = cluster.of("decode")
    moved = sum(worker.status().transferred_bytes for worker in decodes)
    for worker in decodes:
        worker.signal(signal.SIGSTOP)
    try:
        client = AsyncClient(target)
        stream = client.stream([7] * 100, max_tokens=5, temperature=0, ignore_eos=True)
        first = await asyncio.wait_for(anext(stream), WAIT_S)
        assert len(first.token_ids) == 1
        leases = [lease for w in cluster.of("prefill") for lease in w.status().leases]
        assert sum(lease.blocks for lease in leases) == 7  # all of it still lies here
    finally:
        for worker in decodes:
            worker.signal(signal.SIGCONT)
    rest = [token async for chunk in stream for token in chunk.token_ids]
    await client.close()
    assert len(rest) == 4
    status = [await asyncio.to_thread(worker.status) for worker in decodes]
    block_bytes = status[0].description.block_bytes
    assert sum(each.transferred_bytes for each in status) - moved == 7 * block_bytes
    await freed(cluster, time.monotonic())


async def test_a_session_goes_on_where_its_gateway_was_killed(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten turns of /v1/responses: from the second on the history is found in a cache, and what is
    known of the session is not the gateway's that ended."""
    cluster.everywhere(pace_s=0, reads=True)
    doors = []
    for _ in range(2):
        await asyncio.to_thread(cluster.start_gateway)
        doors.append(f"http://{cluster.http}/v1")
    first, second = cluster.gateways[-2:]
    found, history, previous = [], 0, None
    for turn in range(10):
        if turn == 4:
            first.signal(signal.SIGKILL)
        door = doors[0] if turn < 4 else doors[1]
        said = "The capital of France is Paris. " * (12 if turn == 0 else 1)
        async with openai.AsyncOpenAI(base_url=door, api_key="none", timeout=WAIT_S) as client:
            response = await client.responses.create(
                model="", input=said, previous_response_id=previous, max_output_tokens=40
            )
        usage, previous = response.usage, response.id
        assert usage is not None
        if turn:
            found.append(usage.input_tokens_details.cached_tokens / history)
        history = usage.total_tokens
    with capsys.disabled():
        print(f"\ncached of the history, by turn: {' '.join(f'{part:.1%}' for part in found)}")
    assert min(found) >= 0.9
    for gateway in (first, second):
        gateway.end()
