"""What was found of a cluster's workers and pairs, and what is wrong with it: pure functions."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossdock.proto.types import Role

CLOCK_LIMIT_S = 0.1
SLOW_PAIR = 0.25  # of the median pair's bandwidth
MOST = 0.5  # of the bytes read: the path on which they came
RDMA_TRANSPORTS = ("rc", "ud", "dc", "ib", "srd", "gga")
RDMA_DEVICES = ("mlx", "bnxt_re", "irdma", "efa", "roce", "rdmap")
UNKNOWN = "unknown"


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
    for model, group in by_model(workers).items() or [("", [])]:
        roles = {worker.role for worker in group}
        if Role.COLOCATED not in roles:
            of = f" of {model}" if model else ""
            for role in (Role.PREFILL, Role.DECODE):
                if role not in roles:
                    yield Finding("cluster", f"there is no {role} worker{of}", "crossdock scale")


def _layouts(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    """Against the layout that most of a model have, those that differ and in what."""
    for group in by_model(workers).values():
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
            what = f"{rate(pair.bytes_per_s)} by {pair.path}, the median pair {rate(usual)}"
            do = "ask again; if it stays, look at the network between the two"
            yield Finding(pair.name, what, do, problem=False)


def rate(bytes_per_s: float) -> str:
    """As people read it."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def by_model(workers: Sequence[WorkerFacts]) -> dict[str, list[WorkerFacts]]:
    """Workers that may hand KV over to each other."""
    found: defaultdict[str, list[WorkerFacts]] = defaultdict(list)
    for worker in workers:
        found[worker.model].append(worker)
    return found
