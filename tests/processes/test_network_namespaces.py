"""Hosts that lose each other: links cut and slowed under real processes, gateway and clients.

    a: prefill-1      b: decode-1      c: prefill-2, decode-2      g: gateway

KV goes by NIXL over TCP. Requests are first forced onto prefill-1 and decode-1, whose link is slow
so that it can be cut while they pull; then the gateway is told of the others.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from netns_kit import KEY, Cluster, NotPermitted
from offline import LLM
from tiny import make_tiny_model

from crossdock.client import AsyncClient
from crossdock.deploy.authority import Authority
from crossdock.kvtransfer import ucx
from crossdock.proto.channels import open_channel
from crossdock.proto.types import SamplingParams
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc
from crossdock.results import Timings

PROMPT_TOKENS = 800  # 12.8 MB of KV
BLOCKS = PROMPT_TOKENS // 16
SLOW_MBIT = 16.0  # a prompt's KV takes 6 s, and those under way share it
PULL_TIMEOUT_S = 4.0
# Bounds, with room for a busy machine; docs/operations.md has what was measured.
ELSEWHERE_S = PULL_TIMEOUT_S + 8.0  # the longest gap in a stream whose pull was cut
# From the cut until UCX has given up. What is awaited in silence is given up after TCP's time, and
# what is sent into the silence, at the latest just before that, after a time of its own.
TCP_DEAD_S = float(ucx.DEFAULTS["TCP_USER_TIMEOUT"].removesuffix("s"))
TRANSFER_DEAD_S = 2 * TCP_DEAD_S + 5.0
FREED_S = 5.0  # from the end of a request, or of a transfer, whose links are whole
HEALED_S = 25.0  # from a whole link until a request has gone over it
PAIR = ("prefill-1", "decode-1")


@dataclass
class Run:
    """One request, with the time of each token."""

    index: int
    length: int
    begun: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    timings: Timings | None = None
    task: asyncio.Task[None] | None = None

    @property
    def longest_gap(self) -> float:
        times = [self.begun, *self.times]
        return max(after - before for before, after in itertools.pairwise(times))

    @property
    def pair(self) -> tuple[str, str]:
        assert self.timings is not None
        return self.timings.prefill_worker, self.timings.decode_worker


class Rig:
    """One test's hold on the cluster."""

    def __init__(self, cluster: Cluster, engine: LLM) -> None:
        self.cluster = cluster
        self.network = cluster.network
        self.client = AsyncClient(cluster.gateway.target)
        self._engine = engine
        operator = Authority(KEY, "test").credentials("operator", "operator")
        self._channels = [
            open_channel(worker.target, operator, worker.endpoint["incarnation"])
            for worker in cluster.workers.values()
        ]
        self.stubs = {
            name: worker_pb2_grpc.WorkerStub(channel)
            for name, channel in zip(cluster.workers, self._channels)
        }
        self.runs: list[Run] = []

    async def close(self) -> None:
        for run in self.runs:
            assert run.task is not None
            run.task.cancel()
        await asyncio.gather(*(run.task for run in self.runs if run.task), return_exceptions=True)
        await self.client.close()
        for channel in self._channels:
            await channel.close()

    async def members(self, *names: str) -> None:
        """The gateway uses these workers, or all."""
        endpoints = self.cluster.endpoints(*names)
        wanted = sorted(endpoint["name"] for endpoint in endpoints)
        gateway = self.cluster.gateway
        connected = await asyncio.to_thread(gateway.ask, members=endpoints)
        async with asyncio.timeout(20):
            while connected["connected"] != wanted:
                await asyncio.sleep(0.05)
                connected = await asyncio.to_thread(gateway.ask)

    def begin(self, *indices: int, length: int = 40) -> list[Run]:
        """Starts the requests of these numbers: each has its own prompt."""
        runs = [Run(index, length, time.monotonic()) for index in indices]
        for run in runs:
            run.task = asyncio.create_task(self._read(run))
        self.runs += runs
        return runs

    async def _read(self, run: Run) -> None:
        stream = self.client.stream(
            prompt(run.index), max_tokens=run.length, ignore_eos=True, temperature=0, timeout=90
        )
        async for chunk in stream:
            run.tokens += chunk.token_ids
            run.times += [time.monotonic()] * len(chunk.token_ids)
            run.timings = chunk.timings or run.timings

    async def pulling(self, *indices: int) -> list[Run]:
        """Requests that prefill-1 has computed and decode-1 pulls, mid-sequence."""
        await self.members(*PAIR)
        if reason := self.network.slow("a", SLOW_MBIT):
            pytest.skip(reason)  # a pull is over before anything can be cut
        before = (await self.status("decode-1")).transferred_blocks
        runs = self.begin(*indices)
        async with asyncio.timeout(30):
            while not all(run.tokens for run in runs):
                await asyncio.sleep(0.01)
            while (await self.status("decode-1")).used_blocks < BLOCKS * len(runs):
                await asyncio.sleep(0.01)
        await self.members()
        status = await self.status("decode-1")
        assert status.transferred_blocks == before
        assert status.used_blocks >= BLOCKS * len(runs)
        return runs

    async def status(self, name: str) -> worker_pb2.WorkerStatus:
        request = worker_pb2.GetStatusRequest(check_integrity=True)
        status = await self.stubs[name].GetStatus(request, timeout=10)
        assert status.integrity_error == ""
        return status

    async def finished(self, runs: list[Run], longest_gap_s: float) -> None:
        """Every stream ends well, none of its tokens as late as that."""
        async with asyncio.timeout(60):
            await asyncio.gather(*(run.task for run in runs if run.task))
        gaps = [round(run.longest_gap, 2) for run in runs]
        print("longest gaps, s:", gaps, "by", Counter(run.pair for run in runs))
        assert max(gaps) < longest_gap_s

    def check_tokens(self) -> None:
        """Every stream said what an undisturbed engine says."""
        params = [
            SamplingParams(temperature=0, max_tokens=run.length, ignore_eos=True)
            for run in self.runs
        ]
        alone = self._engine.generate([prompt(run.index) for run in self.runs], params)
        for run, undisturbed in zip(self.runs, alone):
            assert run.tokens == [*undisturbed.token_ids], f"prompt {run.index}"

    async def quiet(self, *names: str, cut_at: float | None = None) -> None:
        """These workers, or all, hold nothing any more: FREED_S from now, when all requests have
        ended, or TRANSFER_DEAD_S from the cut, whichever is later."""
        asked = time.monotonic()
        until = asked + FREED_S
        if cut_at is not None:
            until = max(until, cut_at + TRANSFER_DEAD_S)
        for name in names or self.stubs:
            while holds(status := await self.status(name)):
                assert time.monotonic() < until, f"{name} holds {status}"
                await asyncio.sleep(0.05)
        since = asked if cut_at is None else cut_at
        print(f"{names or 'all'} hold nothing after {time.monotonic() - since:.1f} s")

    async def pair_transfers(self, index: int, since: float) -> None:
        """Requests that have only the pair go over it again, all their KV with them: in the
        processes that were there before. Until then they are answered all the same."""
        await self.members(*PAIR)
        for attempt in itertools.count(index):
            before = await self.status("decode-1")
            (run,) = self.begin(attempt)
            await self.finished([run], HEALED_S)
            # Tokens drawn by one prefill after another may be all: then nothing was decoded.
            assert run.pair in (PAIR, (PAIR[0], "")) and run.timings is not None
            if run.timings.transferred_blocks == BLOCKS:
                break
            assert time.monotonic() - since < HEALED_S
            await asyncio.sleep(0.5)
        print(f"healed {run.begun - since:.1f} s after the link was whole")
        after = await self.status("decode-1")
        assert after.transferred_blocks == before.transferred_blocks + BLOCKS
        await self.calls_reach_the_peer()
        await self.members()

    async def calls_reach_the_peer(self) -> None:
        """Not only KV: decode-1 renews and releases leases of prefill-1 again."""
        peer = self.cluster.workers["prefill-1"].endpoint
        request = worker_pb2.ProbeRequest(
            peer_address=peer["address"], peer_incarnation=bytes.fromhex(peer["incarnation"])
        )
        link = worker_pb2.LinkProbe()
        async with asyncio.timeout(10):
            while link.outcome != worker_pb2.LINK_OUTCOME_OK:
                link = (await self.stubs["decode-1"].Probe(request, timeout=20)).link
                await asyncio.sleep(0.1)


def holds(status: worker_pb2.WorkerStatus) -> bool:
    load = status.load
    return bool(status.used_blocks or status.leases or load.running or load.waiting)


def prompt(index: int) -> list[int]:
    """Nothing in common with another index's."""
    return [(index * 37 + j * (index % 89 + 3)) % 250 + 3 for j in range(PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 KB of KV a token."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return make_tiny_model(folder, layers=4, heads=8, kv_heads=8, head_dim=64)


@pytest.fixture(scope="module")
def engine(model: Path) -> LLM:
    return LLM(str(model), num_blocks=512)


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    workers = [
        ("a", "prefill-1", "prefill"),
        ("b", "decode-1", "decode"),
        ("c", "prefill-2", "prefill"),
        ("c", "decode-2", "decode"),
    ]
    try:
        made = Cluster(
            model,
            ["a", "b", "c", "g"],
            workers,
            kv_blocks=512,
            pull_timeout_s=PULL_TIMEOUT_S,
        )
    except NotPermitted as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
async def rig(cluster: Cluster, engine: LLM) -> AsyncIterator[Rig]:
    """All links whole, all workers known, nothing under way; afterwards too."""
    rig = Rig(cluster, engine)
    try:
        await rig.members()
        yield rig
    finally:
        cluster.network.repair()
        await rig.close()


async def test_a_slow_link_is_waited_for_only_so_long(rig: Rig) -> None:
    if reason := rig.network.slow("a", 90.0):  # 1.2 s for a prompt
        pytest.skip(reason)
    await rig.members(*PAIR)
    slow = rig.begin(1)
    await rig.finished(slow, PULL_TIMEOUT_S + 2.0)
    assert slow[0].pair == PAIR and slow[0].longest_gap > 0.8
    rig.network.slow("a", 4.0)  # 26 s
    too_slow = rig.begin(2)
    async with asyncio.timeout(20):
        while not too_slow[0].tokens:
            await asyncio.sleep(0.01)
    await rig.members()
    await rig.finished(too_slow, ELSEWHERE_S)
    assert too_slow[0].pair == ("prefill-2", "decode-2")
    quarantined = await rig.status("decode-1")
    assert quarantined.used_blocks >= BLOCKS and not quarantined.load.running
    rig.network.unslow("a")  # the rest of it comes at once, and gives the blocks back
    await rig.quiet()
    await rig.pair_transfers(3, time.monotonic())
    rig.check_tokens()


async def test_a_link_cut_for_ten_seconds_heals(rig: Rig) -> None:
    runs = await rig.pulling(10, 11, 12, 13)
    rig.network.cut("a", "b")
    cut_at = time.monotonic()
    rig.network.unslow("a")
    fresh: list[Run] = []
    for i in range(10):  # new requests all along, to whom the gateway likes
        fresh += rig.begin(20 + i)
        await asyncio.sleep(max(0.0, cut_at + i + 1 - time.monotonic()))
    rig.network.repair()
    whole_at = time.monotonic()
    await rig.finished([*runs, *fresh], ELSEWHERE_S)
    assert all(PAIR[0] not in run.pair and PAIR[1] not in run.pair for run in runs)
    await rig.quiet(cut_at=cut_at)
    await rig.pair_transfers(30, whole_at)
    await rig.quiet()
    rig.check_tokens()


@pytest.mark.parametrize("host", ["a", "b"])
async def test_a_host_that_is_cut_off_frees_everything_and_comes_back(rig: Rig, host: str) -> None:
    lost, role = {"a": ("prefill-1", 0), "b": ("decode-1", 1)}[host]
    base = 100 + 50 * role
    await rig.members(*PAIR)
    streaming = rig.begin(base, length=300)  # its KV is there: it is in the middle of its answer
    async with asyncio.timeout(20):
        while len(streaming[0].tokens) < 5:
            await asyncio.sleep(0.01)
    runs = [*streaming, *await rig.pulling(base + 1, base + 2)]
    rig.network.unplug(host)
    cut_at = time.monotonic()
    rig.network.unslow("a")
    await rig.finished(runs, ELSEWHERE_S)
    fresh = rig.begin(*range(base + 10, base + 14))
    await rig.finished(fresh, PULL_TIMEOUT_S)
    assert not any(lost in run.pair for run in fresh)
    await rig.quiet(cut_at=cut_at)
    rig.network.repair()
    whole_at = time.monotonic()
    await rig.members()
    await rig.pair_transfers(base + 20, whole_at)
    await rig.quiet()
    rig.check_tokens()


async def test_a_link_cut_for_good_costs_nobody_else_anything(rig: Rig) -> None:
    runs = await rig.pulling(200, 201, 202)
    rig.network.cut("a", "b")
    cut_at = time.monotonic()
    rig.network.unslow("a")
    await rig.finished(runs, ELSEWHERE_S)
    await rig.quiet("prefill-1")  # revoked by the gateway when the pull had failed
    await rig.quiet(cut_at=cut_at)
    # decode-1 tries in vain to reach prefill-1, again and again: the others do not feel it.
    await rig.members("prefill-2", "decode-1")
    for index in range(210, 219):
        await rig.finished(rig.begin(index), PULL_TIMEOUT_S)
        await asyncio.sleep(0.5)
    await rig.members()
    fresh: list[Run] = []
    for index in range(230, 235):
        fresh += rig.begin(index)
        await asyncio.sleep(0.5)
    await rig.finished(fresh, PULL_TIMEOUT_S)
    assert PAIR not in {run.pair for run in fresh}
    rig.network.repair()  # after all
    await rig.pair_transfers(240, time.monotonic())
    await rig.quiet()
    rig.check_tokens()
