"""Is the cluster sound? Asks every worker what runs there and every pair how well KV moves.

`examine` asks; `judge` decides, a pure function of what was found.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from crossdock.exposure import PortFacts, ports_of, wide
from crossdock.proto.channels import open_blocking_channel
from crossdock.proto.convert import ROLE_FROM_PB
from crossdock.proto.identity import Credentials
from crossdock.proto.settings import CONTROLLER_ADDRESS
from crossdock.proto.types import Role
from crossdock.proto.v1 import admin_pb2, worker_pb2, worker_pb2_grpc
from crossdock.results import read_as
from crossdock.tables import table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CLOCK_SAMPLES = 5
CLOCK_LIMIT_S = 0.1
CALL_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 40.0
SLOW_PAIR = 0.25  # of the median pair's bandwidth
MOST = 0.5  # of the bytes read: the path on which they came
RDMA_TRANSPORTS = ("rc", "ud", "dc", "ib", "srd", "gga")
RDMA_DEVICES = ("mlx", "bnxt_re", "irdma", "efa", "roce", "rdmap")
UNKNOWN = "unknown"
LAYOUT_FIELDS = tuple(worker_pb2.KVLayout.DESCRIPTOR.fields_by_name)


@dataclass(frozen=True)
class WorkerFacts:
    """One worker as it was found. Skew is its clock less the asking machine's, seconds."""

    name: str
    role: str
    address: str = ""
    node: str = ""
    error: str = ""  # why nothing below is known
    transport: str = ""
    layout_hash: str = ""
    layout: Mapping[str, Any] = field(default_factory=dict)
    skew_s: float = 0.0
    skew_error_s: float = 0.0  # half the round trip: the skew may be off by as much
    versions: Mapping[str, str] = field(default_factory=dict)
    ucx: Mapping[str, str] = field(default_factory=dict)
    rdma_devices: Sequence[str] = ()
    host: str = ""
    memory_type: str = ""
    model: str = ""  # where the cluster has several


@dataclass(frozen=True)
class PairFacts:
    """What `decode` found when it read KV of `prefill`. Zero: not measured."""

    decode: str
    prefill: str
    outcome: str  # ok, unreachable, layout, read_failed, busy
    message: str = ""
    handshake_s: float = 0.0
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    blocks: int = 0
    bytes: int = 0
    tcp_bytes: int | None = None
    rdma_bytes: int | None = None
    path: str = UNKNOWN

    @property
    def name(self) -> str:
        """Both ends, reader first."""
        return f"{self.decode} <- {self.prefill}"


@dataclass(frozen=True)
class Finding:
    """One line. A problem fails the check, a warning does not."""

    subject: str  # a worker, a pair, or what differs
    what: str
    do: str
    problem: bool = True

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}; {self.do}"


@dataclass(frozen=True)
class Report:
    """What was found of a cluster's workers, pairs and ports."""

    cluster: str
    workers: Sequence[WorkerFacts]
    pairs: Sequence[PairFacts]
    ports: Sequence[PortFacts] = ()
    local: bool = False  # all on one host

    @property
    def findings(self) -> list[Finding]:
        """Every problem and warning, problems first."""
        found = judge(self.workers, self.pairs)
        found += [Finding(*each) for each in wide(self.ports, self.local)]
        return sorted(found, key=lambda finding: not finding.problem)


# -- judging -----------------------------------------------------------------------------------


def judge(workers: Sequence[WorkerFacts], pairs: Sequence[PairFacts]) -> list[Finding]:
    """What is wrong, worst first. Reads no clock and asks nobody."""
    known = [worker for worker in workers if not worker.error]
    by_name = {worker.name: worker for worker in workers}
    found = [
        *_missing(workers),
        *_layouts(known),
        *_versions(known),
        *_clocks(known),
        *(finding for pair in pairs for finding in _pair(pair, by_name)),
        *_slow(pairs),
    ]
    return sorted(found, key=lambda finding: not finding.problem)


def path_taken(pair: PairFacts, decode: WorkerFacts, prefill: WorkerFacts) -> str:
    """tcp, rdma, shared memory, "not tcp, not rdma", or unknown; by what the kernel counted."""
    if decode.transport == "local":
        return "shared memory"
    if pair.bytes == 0:
        return UNKNOWN
    tcp = _moved(pair.tcp_bytes, pair.bytes)
    rdma = _moved(pair.rdma_bytes, pair.bytes) if decode.rdma_devices else False
    if tcp and not rdma:
        return "tcp"
    if rdma and tcp is False:
        return "rdma"
    if tcp is False and rdma is False and decode.host == prefill.host != "":
        on_host = decode.memory_type == prefill.memory_type == "DRAM"
        return "shared memory" if on_host else "not tcp, not rdma"
    return UNKNOWN


def asks_for_rdma(worker: WorkerFacts) -> str:
    """The UCX setting by which it does, empty where none."""
    for setting, prefixes in (("TLS", RDMA_TRANSPORTS), ("NET_DEVICES", RDMA_DEVICES)):
        value = worker.ucx.get(setting, "").strip()
        names = [each.strip().partition(":")[0] for each in value.split(",")]
        known = [n for n in names if n.startswith(prefixes) or n in worker.rdma_devices]
        if known and not value.startswith("^"):
            return f"UCX_{setting}={value}"
    return ""


def _moved(counted: int | None, nbytes: int) -> bool | None:
    return None if counted is None else counted >= MOST * nbytes


def _missing(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    for worker in workers:
        if worker.error:
            do = "see crossdock status and its log; can it be reached from here?"
            yield Finding(worker.name, worker.error, do)
    for model, group in _by_model(workers).items() or [("", [])]:
        roles = {worker.role for worker in group}
        if Role.COLOCATED not in roles:
            of = f" of {model}" if model else ""
            for role in (Role.PREFILL, Role.DECODE):
                if role not in roles:
                    yield Finding("cluster", f"there is no {role} worker{of}", "crossdock scale")


def _by_model(workers: Sequence[WorkerFacts]) -> dict[str, list[WorkerFacts]]:
    found: defaultdict[str, list[WorkerFacts]] = defaultdict(list)
    for worker in workers:
        found[worker.model].append(worker)
    return found


def _layouts(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    """Against the layout that most of a model have, those that differ and in what."""
    for group in _by_model(workers).values():
        yield from _layouts_of_one(group)


def _layouts_of_one(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    """Of workers that hand KV over, and of colocated ones with their kind of engine."""
    alike: dict[str, list[WorkerFacts]] = defaultdict(list)
    for worker in sorted(workers, key=lambda worker: worker.role == Role.COLOCATED):
        kind = worker.layout.get("engine", "")
        alike[kind if worker.role == Role.COLOCATED else next(iter(alike), kind)].append(worker)
    for group in alike.values():
        usual = statistics.mode(worker.layout_hash for worker in group)
        like = next(worker for worker in group if worker.layout_hash == usual)
        for worker in [worker for worker in group if worker.layout_hash != usual]:
            differing = ", ".join(
                f"{name} is {value!r}, {like.layout.get(name)!r} on {like.name}"
                for name, value in worker.layout.items()
                if value != like.layout.get(name)
            )
            what = f"its KV layout differs: {differing or 'the hash alone'}"
            do = "give all workers the same model file, model.dtype and kv.block_size"
            yield Finding(worker.name, what, do)


def _versions(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    for package in dict.fromkeys(name for worker in workers for name in worker.versions):
        having = defaultdict(list)
        for worker in workers:
            having[worker.versions.get(package, "")].append(worker.name)
        if len(having) > 1:
            what = "; ".join(
                f"{version or 'none'} on {', '.join(names)}"
                for version, names in sorted(having.items())
            )
            yield Finding(package, what, "install the same version everywhere")


def _clocks(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    for worker in workers:
        if abs(worker.skew_s) - worker.skew_error_s > CLOCK_LIMIT_S:
            way = "ahead of" if worker.skew_s > 0 else "behind"
            what = f"its clock is {abs(worker.skew_s):.3f} s {way} this machine's"
            yield Finding(worker.name, what, "deadlines go by it: synchronize both (chrony, NTP)")


def _pair(pair: PairFacts, workers: Mapping[str, WorkerFacts]) -> Iterator[Finding]:
    decode, prefill = workers[pair.decode], workers[pair.prefill]
    if pair.outcome == "unreachable":
        do = f"can {decode.node or pair.decode} reach {prefill.address}? look at routes, firewall"
        yield Finding(pair.name, pair.message, do)
    elif pair.outcome == "layout":
        yield Finding(pair.name, pair.message, "make model, dtype and kv.block_size equal")
    elif pair.outcome == "read_failed":
        do = "they talk gRPC but KV does not move: look at kv.ucx, and ports between the nodes"
        yield Finding(pair.name, f"reading KV failed: {pair.message}", do)
    elif pair.outcome == "busy":
        what = f"bandwidth was not measured: {pair.message}"
        yield Finding(pair.name, what, "ask again when it is less busy", problem=False)
    setting = asks_for_rdma(decode) or asks_for_rdma(prefill)
    if setting and pair.outcome == "ok":
        if pair.path == "tcp":
            here = ", ".join(decode.rdma_devices) or "none"
            what = f"{setting} asks for RDMA, but the bytes came by TCP"
            do = f"look at ibv_devinfo and kv.ucx (RDMA devices that {pair.decode} sees: {here})"
            yield Finding(pair.name, what, do)
        elif pair.path == UNKNOWN:
            what = f"{setting} asks for RDMA, and which path the bytes took cannot be told"
            do = "UCX_LOG_LEVEL=info on the workers shows it in their logs"
            yield Finding(pair.name, what, do, problem=False)


def _slow(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    measured = [pair for pair in pairs if pair.bytes_per_s > 0]
    if len(measured) < 3:
        return
    usual = statistics.median(pair.bytes_per_s for pair in measured)
    for pair in measured:
        if pair.bytes_per_s < SLOW_PAIR * usual:
            what = f"{_rate(pair.bytes_per_s)} by {pair.path}, the median pair {_rate(usual)}"
            do = "ask again; if it stays, look at the network between the two"
            yield Finding(pair.name, what, do, problem=False)


# -- asking ------------------------------------------------------------------------------------


def examine(
    cluster: admin_pb2.ClusterStatus,
    at_once: int = 1,
    controller: str = CONTROLLER_ADDRESS,
    credentials: Credentials | None = None,
) -> Report:
    """Asks all workers of the cluster, then measures all pairs. Every call has its time limit.

    controller: where the status is from, which names the ports if it was asked for them.
    at_once: pairs measured at the same time, no worker in two of them. credentials: an operator's.
    """
    workers = [_examine_worker(member, credentials) for member in cluster.workers]
    incarnations = {m.name: m.worker.description.incarnation for m in cluster.workers}

    def ask(pair: tuple[WorkerFacts, WorkerFacts]) -> PairFacts:
        decode, prefill = pair
        ends = incarnations[decode.name], incarnations[prefill.name]
        return _examine_pair(decode, prefill, ends, credentials)

    known = [worker for worker in workers if not worker.error]
    pairs: list[PairFacts] = []
    with ThreadPoolExecutor(max_workers=max(1, at_once)) as pool:
        for group in _by_model(known).values():
            decodes = [worker for worker in group if worker.role == Role.DECODE]
            prefills = [worker for worker in group if worker.role == Role.PREFILL]
            for some in rounds(decodes, prefills):
                pairs += pool.map(ask, some)
    pairs.sort(key=lambda pair: (pair.decode, pair.prefill))
    return Report(cluster.name, workers, pairs, ports_of(cluster, controller), cluster.local)


def rounds(
    decodes: Sequence[WorkerFacts], prefills: Sequence[WorkerFacts]
) -> Iterator[list[tuple[WorkerFacts, WorkerFacts]]]:
    """All pairs, in rounds in which each worker is at most once."""
    size = max(len(decodes), len(prefills))
    for shift in range(size):
        yield [
            (decode, prefills[(index + shift) % size])
            for index, decode in enumerate(decodes)
            if (index + shift) % size < len(prefills)
        ]


def _examine_worker(member: admin_pb2.MemberStatus, credentials: Credentials | None) -> WorkerFacts:
    known = partial(
        WorkerFacts,
        name=member.name,
        role=str(ROLE_FROM_PB.get(member.role, "")),
        address=member.address,
        node=member.node_id,
        model=member.model,
    )
    if member.state != "ready":
        return known(error=f"is {member.state}" + (f" ({member.error})" if member.error else ""))
    if not member.HasField("worker"):
        return known(error="does not answer the controller")
    incarnation = member.worker.description.incarnation.hex()
    try:
        with open_blocking_channel(member.address, credentials, incarnation) as channel:
            probe, skew_s, skew_error_s = _ask_clock(worker_pb2_grpc.WorkerStub(channel))
    except grpc.RpcError as error:
        return known(error=f"does not answer at {member.address} ({_words(error)})")
    description = member.worker.description
    return known(
        transport=description.transport,
        layout_hash=description.layout_hash.hex(),
        layout={name: getattr(description.layout, name) for name in LAYOUT_FIELDS},
        skew_s=skew_s,
        skew_error_s=skew_error_s,
        versions=dict(sorted(probe.versions.items())),
        ucx=dict(probe.ucx),
        rdma_devices=tuple(probe.rdma_devices),
        host=probe.host_id,
        memory_type=probe.memory_type,
    )


def _ask_clock(stub: worker_pb2_grpc.WorkerStub) -> tuple[worker_pb2.ProbeResponse, float, float]:
    """(answer, skew, its possible error): of the quickest of some round trips, at its midpoint."""
    samples: list[tuple[float, float, worker_pb2.ProbeResponse]] = []
    for _ in range(CLOCK_SAMPLES):
        sent, start = time.time(), time.perf_counter()
        answer = stub.Probe(worker_pb2.ProbeRequest(), timeout=CALL_TIMEOUT_S)
        took = time.perf_counter() - start
        samples.append((took, answer.unix_s - (sent + took / 2), answer))
    took, skew_s, answer = min(samples, key=lambda sample: sample[0])
    return answer, skew_s, took / 2


def _examine_pair(
    decode: WorkerFacts,
    prefill: WorkerFacts,
    incarnations: tuple[bytes, bytes],
    credentials: Credentials | None = None,
) -> PairFacts:
    reader, owner = incarnations
    request = worker_pb2.ProbeRequest(peer_address=prefill.address, peer_incarnation=owner)
    try:
        with open_blocking_channel(decode.address, credentials, reader.hex()) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            link = stub.Probe(request, timeout=PROBE_TIMEOUT_S).link
    except grpc.RpcError as error:
        message = f"{decode.name} did not answer ({_words(error)})"
        return PairFacts(decode.name, prefill.name, "unreachable", message)
    outcome = worker_pb2.LinkOutcome.Name(link.outcome).removeprefix("LINK_OUTCOME_").lower()
    pair = read_as(
        PairFacts,
        link,
        decode=decode.name,
        prefill=prefill.name,
        outcome=outcome,
        tcp_bytes=link.tcp_bytes if link.HasField("tcp_bytes") else None,
        rdma_bytes=link.rdma_bytes if link.HasField("rdma_bytes") else None,
        path="",
    )
    return replace(pair, path=path_taken(pair, decode, prefill)) if outcome == "ok" else pair


def _words(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}" if hasattr(error, "code") else str(error)


# -- showing -----------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """The report as a JSON document."""
    findings = report.findings
    return {
        "cluster": report.cluster,
        "ok": not any(finding.problem for finding in findings),
        "workers": [asdict(worker) for worker in report.workers],
        "pairs": [asdict(pair) for pair in report.pairs],
        "ports": [asdict(port) for port in report.ports],
        "problems": [asdict(each) for each in findings if each.problem],
        "warnings": [asdict(each) for each in findings if not each.problem],
    }


def show(report: Report, console: Console) -> None:
    """Prints the report as tables."""
    console.print(_workers_table(report.workers))
    console.print(_pairs_table(report.pairs))
    console.print(_ports_table(report.ports))


def _workers_table(workers: Sequence[WorkerFacts]) -> Table:
    packages = list(dict.fromkeys(name for worker in workers for name in worker.versions))
    columns = ("worker", "role", "node", "clock ms", *packages, "layout")
    rows = []
    for each in workers:
        clock = f"{1000 * each.skew_s:+.1f} ± {1000 * each.skew_error_s:.1f}"
        facts = ["" if each.error else clock, *(each.versions.get(n, "") for n in packages)]
        rows.append([each.name, each.role, each.node[:8], *facts, each.layout_hash[:8]])
    return table("workers", columns, rows, figures={"clock ms"})


def _pairs_table(pairs: Sequence[PairFacts]) -> Table:
    figures = ("handshake", "latency", "bandwidth", "blocks")
    rows = []
    for each in pairs:
        times = [_milliseconds(each.handshake_s), _milliseconds(each.latency_s)]
        moved = [_rate(each.bytes_per_s) if each.bytes_per_s else "", each.blocks or ""]
        rows.append([each.decode, each.prefill, each.outcome, *times, *moved, each.path])
    return table("pairs", ("decode", "prefill", "outcome", *figures, "path"), rows, figures)


def _ports_table(ports: Sequence[PortFacts]) -> Table:
    rows = [[p.node[:8], p.what, p.address, p.process, p.pid] for p in ports]
    return table("ports", ("node", "what", "listens on", "process", "pid"), rows, figures={"pid"})


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds else ""


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
