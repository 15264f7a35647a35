"""crossdock doctor: its judgement on hand-made findings, its probes on real workers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from doctor_kit import LAYOUT, OK, VERSIONS, D, P, facts, lines, warnings
from rich.console import Console
from tiny import make_tiny_model

from crossdock import cli, doctor
from crossdock.decode import role as decode_worker
from crossdock.doctor import Report
from crossdock.findings import PairFacts, WorkerFacts, asks_for_rdma, judge, path_taken
from crossdock.kvtransfer import traffic
from crossdock.kvtransfer.transport import Handle
from crossdock.prefill import role as prefill_worker
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.types import Role
from crossdock.proto.v1 import admin_pb2, worker_pb2, worker_pb2_grpc
from crossdock.worker import probe
from crossdock.worker.config import WorkerConfig
from crossdock.worker.server import WorkerServer

# -- judgement ---------------------------------------------------------------------------------


def test_a_sound_cluster_has_no_findings() -> None:
    assert judge([P, D], [OK]) == []


def test_a_worker_that_is_not_there_is_named() -> None:
    assert lines([P, D, WorkerFacts("d-1", "decode", error="is lost")])[0].startswith(
        "d-1: is lost; "
    )
    assert lines([D])[0].startswith("cluster: there is no prefill worker; ")
    assert judge([facts("c", Role.COLOCATED)], []) == []


def test_a_layout_that_differs_names_its_fields_and_both_values() -> None:
    odd = replace(D, name="d-1", layout_hash="bb", layout=LAYOUT | {"dtype": "bfloat16"})
    (line,) = lines([P, D, odd])
    assert line.startswith("d-1: its KV layout differs: dtype is 'bfloat16', 'float32' on p; ")


def test_colocated_workers_of_another_engine_lay_their_kv_out_otherwise() -> None:
    simulated = LAYOUT | {"engine": "simulated"}
    assert not judge([P, D, facts("c", Role.COLOCATED, layout_hash="bb", layout=simulated)], [OK])
    reader = facts("d-1", Role.DECODE, layout_hash="bb", layout=simulated)
    assert lines([P, D, reader], OK)[0].startswith("d-1: its KV layout differs: engine is 'simul")


def test_a_colocated_worker_with_other_weights_is_named() -> None:
    other = facts("c", Role.COLOCATED, layout_hash="bb", layout=LAYOUT | {"weights_digest": "bb"})
    assert lines([P, D, other], OK)[0].startswith("c: its KV layout differs: weights_digest is")


def test_versions_are_those_of_the_transport() -> None:
    assert set(probe._versions("nixl")) == {"python", *probe.PACKAGES}
    with_nccl = {"python", *probe.PACKAGES, "cupy-cuda13x", "nvidia-nccl-cu13"}
    assert set(probe._versions("nccl")) == with_nccl


def test_versions_that_differ_name_who_has_which() -> None:
    old = replace(D, name="d-1", versions=VERSIONS | {"torch": "2.12.0"})
    (line,) = lines([P, D, old])
    assert line.startswith("torch: 2.12.0 on d-1; 2.13.0 on p, d; ")


@pytest.mark.parametrize(
    ("skew_s", "error_s", "found"),
    [(0.5, 0.001, "ahead of"), (-0.5, 0.001, "behind"), (0.09, 0.001, ""), (0.5, 0.45, "")],
)
def test_a_clock_is_off_only_by_more_than_the_round_trip_can_hide(
    skew_s: float, error_s: float, found: str
) -> None:
    got = lines([P, replace(D, skew_s=skew_s, skew_error_s=error_s)])
    assert bool(got) == bool(found)
    if found:
        assert got[0].startswith(f"d: its clock is 0.500 s {found} this machine's")


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("unreachable", "d <- p: why; can node-of-d reach p:1?"),
        ("layout", "d <- p: why; make model"),
        ("read_failed", "d <- p: reading KV failed: why; "),
    ],
)
def test_a_pair_that_fails_is_named_with_what_to_do(outcome: str, words: str) -> None:
    (line,) = lines([P, D], PairFacts("d", "p", outcome, "why"))
    assert line.startswith(words)


def test_a_busy_pair_is_a_warning() -> None:
    pair = PairFacts("d", "p", "busy", "no blocks")
    assert lines([P, D], pair) == []
    assert warnings([P, D], pair)[0].startswith("d <- p: bandwidth was not measured: no blocks")


RDMA = replace(D, ucx={"TLS": "rc,cuda"}, rdma_devices=("mlx5_0",))


@pytest.mark.parametrize(
    ("path", "problems", "notes"), [("tcp", 1, 0), ("unknown", 0, 1), ("rdma", 0, 0)]
)
def test_rdma_that_was_asked_for_and_not_taken(path: str, problems: int, notes: int) -> None:
    pair = replace(OK, path=path)
    assert len(lines([P, RDMA], pair)) == problems
    assert len(warnings([P, RDMA], pair)) == notes
    assert judge([P, D], [pair]) == []  # nobody asked
    if path == "tcp":
        assert (
            "d <- p: UCX_TLS=rc,cuda asks for RDMA, but the bytes came by TCP"
            in lines([P, RDMA], pair)[0]
        )


@pytest.mark.parametrize(
    ("ucx", "asked"),
    [
        ({"TLS": "rc_mlx5,cuda_ipc"}, True),
        ({"TLS": "tcp, ud"}, True),
        ({"TLS": "^rc,ud"}, False),
        ({"TLS": "tcp,cuda"}, False),
        ({"NET_DEVICES": "mlx5_0:1"}, True),
        ({"NET_DEVICES": "own0:1"}, True),
        ({"NET_DEVICES": "eth0"}, False),
        ({}, False),
    ],
)
def test_which_settings_ask_for_rdma(ucx: dict[str, str], asked: bool) -> None:
    assert bool(asks_for_rdma(replace(D, ucx=ucx, rdma_devices=("own0",)))) == asked


OTHER_HOST = replace(P, host="two")
WITH_RDMA = replace(D, rdma_devices=("mlx5_0",))


@pytest.mark.parametrize(
    ("decode", "prefill", "tcp", "rdma", "path"),
    [
        (D, P, 1_010, None, "tcp"),
        (D, P, 40, None, "shared memory"),
        (D, P, None, None, "unknown"),
        (D, OTHER_HOST, 1_010, None, "tcp"),
        (D, OTHER_HOST, 40, None, "unknown"),
        (WITH_RDMA, OTHER_HOST, 40, 1_000, "rdma"),
        (WITH_RDMA, OTHER_HOST, 1_010, 20, "tcp"),
        (WITH_RDMA, OTHER_HOST, 1_010, None, "tcp"),
        (WITH_RDMA, OTHER_HOST, 1_010, 1_000, "unknown"),
        (WITH_RDMA, OTHER_HOST, None, 1_000, "unknown"),
        (WITH_RDMA, P, 40, None, "unknown"),
        (replace(D, memory_type="VRAM"), P, 40, None, "not tcp, not rdma"),
        (replace(D, transport="local"), P, None, None, "shared memory"),
    ],
)
def test_the_path_is_told_by_what_was_counted(
    decode: WorkerFacts, prefill: WorkerFacts, tcp: int | None, rdma: int | None, path: str
) -> None:
    pair = replace(OK, tcp_bytes=tcp, rdma_bytes=rdma)
    assert path_taken(pair, decode, prefill) == path


def test_nothing_read_is_no_path() -> None:
    assert path_taken(replace(OK, bytes=0, tcp_bytes=0), D, P) == "unknown"


def test_a_pair_far_slower_than_the_others_is_a_warning() -> None:
    workers = [P, *(replace(D, name=f"d{i}") for i in range(4))]
    pairs = [replace(OK, decode=f"d{i}", bytes_per_s=2e9) for i in range(4)]
    assert judge(workers, pairs) == []
    pairs[2] = replace(pairs[2], bytes_per_s=1e8)
    (line,) = warnings(workers, *pairs)
    assert line.startswith("d2 <- p: 0.10 GB/s by shared memory, the median pair 2.00 GB/s")


@pytest.mark.parametrize(("decodes", "prefills"), [(2, 2), (3, 1), (1, 3), (4, 3), (0, 2)])
def test_rounds_hold_every_pair_once_and_no_worker_twice(decodes: int, prefills: int) -> None:
    ds = [replace(D, name=f"d{i}") for i in range(decodes)]
    ps = [replace(P, name=f"p{i}") for i in range(prefills)]
    seen = []
    for some in doctor.rounds(ds, ps):
        names = [worker.name for pair in some for worker in pair]
        assert len(set(names)) == len(names)
        seen += [(decode.name, prefill.name) for decode, prefill in some]
    assert sorted(seen) == [(d.name, p.name) for d in ds for p in ps]


def test_growth_counts_new_sockets_and_says_nothing_where_nothing_is_known() -> None:
    before = traffic.Received(tcp={1: 100, 2: 50}, rdma=None)
    after = traffic.Received(tcp={1: 130, 3: 7}, rdma={"mlx5_0:1": 5})
    assert traffic.growth(before, after) == (37, None)


# -- real workers ------------------------------------------------------------------------------


class Cluster:
    """Real workers in this process, and what a controller would say of them."""

    def __init__(self, model: Path, transport: str, **settings: Any) -> None:
        self.model, self.transport, self.settings = model, transport, settings
        self.workers: list[WorkerServer] = []

    async def add(self, name: str, role: Role, **settings: Any) -> WorkerServer:
        create = prefill_worker.create if role is Role.PREFILL else decode_worker.create
        options = {"kv_memory_mb": 4, "model": str(self.model)} | self.settings | settings
        worker = create(
            WorkerConfig(
                name=name,
                pool=str(role),
                role=role,
                cluster_key=b"a key of this test cluster",
                transport=self.transport,
                **options,
            )
        )
        await worker.start()
        self.workers.append(worker)
        return worker

    async def status(self) -> admin_pb2.ClusterStatus:
        return admin_pb2.ClusterStatus(
            name="test",
            workers=[
                admin_pb2.MemberStatus(
                    name=worker.config.name,
                    role=ROLE_TO_PB[worker.config.role],
                    state="ready",
                    address=worker.description.address,
                    node_id="here",
                    worker=await worker.status(),
                )
                for worker in self.workers
            ],
            converged=True,
        )

    async def examined(self) -> Report:
        return await asyncio.to_thread(doctor.examine, await self.status())

    async def link(self, decode: WorkerServer, prefill: WorkerServer) -> worker_pb2.LinkProbe:
        request = worker_pb2.ProbeRequest(
            peer_address=prefill.description.address,
            peer_incarnation=prefill.description.incarnation,
        )
        async with grpc.aio.insecure_channel(decode.description.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return (await stub.Probe(request, timeout=30)).link

    async def nothing_held(self) -> None:
        for worker in self.workers:
            async with asyncio.timeout(5):
                while (status := await worker.status(check_integrity=True)).used_blocks:
                    await asyncio.sleep(0.01)
            assert status.integrity_error == ""


@pytest.fixture(params=["local", pytest.param("nixl", marks=pytest.mark.slow)])
async def cluster(request: Any, tiny_model: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tiny_model, request.param)
    await made.add("p0", Role.PREFILL)
    await made.add("d0", Role.DECODE)
    yield made
    for worker in made.workers:
        await worker.stop()


async def test_every_pair_is_measured_and_every_block_given_back(cluster: Cluster) -> None:
    await cluster.add("d1", Role.DECODE)
    await cluster.add("c0", Role.COLOCATED)  # neither reads nor is read
    report = await cluster.examined()
    assert report.findings == []
    assert [pair.name for pair in report.pairs] == ["d0 <- p0", "d1 <- p0"]
    for pair in report.pairs:
        assert pair.outcome == "ok" and pair.path == "shared memory"
        assert pair.blocks == probe.MAX_BLOCKS
        assert 0 < pair.latency_s < 0.1 and pair.handshake_s > 0 and pair.bytes_per_s > 1e6
    for worker in report.workers:
        assert abs(worker.skew_s) <= worker.skew_error_s + 0.002
        assert set(worker.versions) == {"python", *probe.PACKAGES}
    await cluster.nothing_held()
    console = Console(width=160, record=True, quiet=True)
    doctor.show(report, console)
    json.dumps(doctor.as_json(report))


async def test_what_is_read_stays_out_of_blocks_in_use(cluster: Cluster) -> None:
    """Every block but four belongs to a request: the probe takes two of the four."""
    prefill, decode = cluster.workers
    mine = await decode.call(lambda role: role.state.pool.allocate(role.state.pool.num_free - 4))
    memory = await decode.call(lambda role: role.state.memory)
    memory.views[0][mine] = 7
    link = await cluster.link(decode, prefill)
    assert link.outcome == worker_pb2.LINK_OUTCOME_OK and link.blocks == 2
    assert (memory.views[0][mine] == 7).all()
    await decode.call(lambda role: role.state.pool.release(mine))
    await cluster.nothing_held()


async def test_a_worker_without_free_blocks_is_busy(cluster: Cluster) -> None:
    decode = cluster.workers[1]
    mine = await decode.call(lambda role: role.state.pool.allocate(role.state.pool.num_free))
    report = await cluster.examined()
    (pair,) = report.pairs
    assert pair.outcome == "busy" and "KV blocks are in use" in pair.message
    assert pair.latency_s > 0 and pair.bytes_per_s == 0
    (finding,) = report.findings
    assert not finding.problem and finding.subject == "d0 <- p0"
    await decode.call(lambda role: role.state.pool.release(mine))
    await cluster.nothing_held()


async def test_a_layout_mismatch_names_the_fields(cluster: Cluster, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=5)
    await cluster.add("d1", Role.DECODE, model=str(other), block_size=32)
    report = await cluster.examined()
    assert {pair.decode: pair.outcome for pair in report.pairs} == {"d0": "ok", "d1": "layout"}
    found = {finding.subject: finding.what for finding in report.findings}
    assert set(found) == {"d1", "d1 <- p0"}
    for what in found.values():
        assert "block_size" in what and "32" in what and "16" in what and "digest" in what
        assert re.search(r"regions is '1 x \d+'.* '1 x \d+'", what)
    await cluster.nothing_held()


async def test_a_dead_peer_is_named(cluster: Cluster) -> None:
    """Known as ready, gone by the time its partner asks."""
    prefill, decode = cluster.workers
    assert (await cluster.link(decode, prefill)).outcome == worker_pb2.LINK_OUTCOME_OK
    status = await cluster.status()
    facts_before = (await asyncio.to_thread(doctor.examine, status)).workers
    cluster.workers.remove(prefill)
    await prefill.stop()
    start = time.monotonic()
    ends = decode.description.incarnation, prefill.description.incarnation
    d, p = facts_before[1], facts_before[0]
    pair = await asyncio.to_thread(doctor._examine_pair, d, p, ends)
    assert pair.outcome == "unreachable" and p.address in pair.message
    report = await asyncio.to_thread(doctor.examine, status)
    assert time.monotonic() - start < 15
    (finding,) = report.findings
    assert finding.subject == "p0" and "does not answer" in finding.what and finding.problem
    await cluster.nothing_held()


async def test_another_worker_under_the_address_is_not_taken_for_it(cluster: Cluster) -> None:
    prefill, decode = cluster.workers
    request = worker_pb2.ProbeRequest(
        peer_address=prefill.description.address, peer_incarnation=b"x" * 16
    )
    link = (await decode.prober.probe(request)).link
    assert link.outcome == worker_pb2.LINK_OUTCOME_UNREACHABLE and "restarted" in link.message


async def test_blocks_of_a_read_that_does_not_end_are_kept_until_it_does(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = cluster.workers
    stuck = Handle()
    transport = decode.prober._transport
    monkeypatch.setattr(probe, "READS_S", 0.3)
    monkeypatch.setattr(transport, "read_blocks", lambda *_: stuck)
    link = await cluster.link(decode, prefill)
    assert link.outcome == worker_pb2.LINK_OUTCOME_READ_FAILED and "0.3 s" in link.message
    await asyncio.sleep(0.2)
    status = await decode.status(check_integrity=True)
    assert status.used_blocks == probe.MAX_BLOCKS and status.integrity_error == ""
    stuck.fail("at last")
    await cluster.nothing_held()


async def test_a_caller_that_goes_away_leaves_no_block_behind(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = cluster.workers
    asked = asyncio.create_task(cluster.link(decode, prefill))
    monkeypatch.setattr(probe, "BULK_READS", 2000)
    async with asyncio.timeout(30):
        while not (await decode.status()).used_blocks:
            await asyncio.sleep(0)
    asked.cancel()
    await cluster.nothing_held()


async def test_bytes_by_tcp_are_told_from_shared_memory(tiny_model: Path) -> None:
    made = Cluster(tiny_model, "nixl", transport_options={"TLS": "tcp"})
    try:
        await made.add("p0", Role.PREFILL)
        await made.add("d0", Role.DECODE)
        (pair,) = (await made.examined()).pairs
        assert pair.path == "tcp", asdict(pair)
        assert pair.tcp_bytes is not None and pair.tcp_bytes >= pair.bytes
    finally:
        for worker in made.workers:
            await worker.stop()


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_and_exits(
    sound: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from crossdock.deploy import admin, credentials

    monkeypatch.setattr(credentials, "find", lambda *_: None)
    pair = OK if sound else PairFacts("d", "p", "unreachable", "p:1 does not answer")
    monkeypatch.setattr(admin, "status", lambda address, **_: SimpleNamespace())
    monkeypatch.setattr(doctor, "examine", lambda *_: Report("c", [P, D], [pair]))
    code = cli.main(["doctor", *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert code == (0 if sound else 1)
    assert ("error: d <- p: p:1 does not answer; " in err) == (not sound)
    if as_json:
        found = json.loads(out)
        assert found["ok"] == sound and found["pairs"][0]["decode"] == "d"
    else:
        assert "pairs" in out and ("sound: 2 workers, 1 pairs" in out) == sound


def test_a_read_that_ends_at_once_is_timed_from_before_it_is_posted() -> None:
    def post() -> Handle:
        time.sleep(0.01)
        done = Handle()
        done.finish()
        return done

    assert probe._seconds(post, time.monotonic() + 1) >= 0.01


def test_the_page_describes_every_column() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text("utf-8")
    section = page.split("## Is the cluster sound?")[1].split("\n## ")[0]
    tables = (doctor._workers_table([P, D]), doctor._pairs_table([OK]), doctor._ports_table([]))
    for column in (column for table in tables for column in table.columns):
        assert str(column.header) in section
    for outcome in worker_pb2.LinkOutcome.keys()[1:]:
        assert f"`{outcome.removeprefix('LINK_OUTCOME_').lower()}`" in section
