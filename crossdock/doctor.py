"""Is the cluster sound? Asks every worker what runs there and every pair how well KV moves.

`examine` asks; what is wrong, crossdock.findings says of what was found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from crossdock.exposure import PortFacts, ports_of, wide
from crossdock.findings import Finding, PairFacts, WorkerFacts, by_model, judge, path_taken, rate
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
CALL_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 40.0
LAYOUT_FIELDS = tuple(worker_pb2.KVLayout.DESCRIPTOR.fields_by_name)


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
        for group in by_model(known).values():
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
        moved = [rate(each.bytes_per_s) if each.bytes_per_s else "", each.blocks or ""]
        rows.append([each.decode, each.prefill, each.outcome, *times, *moved, each.path])
    return table("pairs", ("decode", "prefill", "outcome", *figures, "path"), rows, figures)


def _ports_table(ports: Sequence[PortFacts]) -> Table:
    rows = [[p.node[:8], p.what, p.address, p.process, p.pid] for p in ports]
    return table("ports", ("node", "what", "listens on", "process", "pid"), rows, figures={"pid"})


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds else ""
