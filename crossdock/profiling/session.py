"""Profiles a running cluster: asks the controller who is there, measures, fits, writes YAML."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from crossdock import doctor
from crossdock.client import AsyncClient, Tls
from crossdock.deploy import admin, credentials
from crossdock.engine.profiles import Profile
from crossdock.findings import PairFacts
from crossdock.profiling.fit import Fit, contention, fit
from crossdock.profiling.measure import Limits, Measurement
from crossdock.proto.errors import Unavailable
from crossdock.proto.v1 import admin_pb2, worker_pb2


@dataclass(frozen=True)
class Profiled:
    """What was found of a cluster."""

    profile: Profile
    fit: Fit
    pairs: int  # of workers whose link was measured
    notes: Sequence[str] = ()  # what to think of before relying on it


async def profile_cluster(
    target: str,
    controller: str,
    seconds: float,
    model: str = "",
    tls: Tls | None = None,
    credential: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Profiled:
    """Measures for about so many seconds. Raises Unavailable where no worker of the model is ready
    or nothing could be measured, and as requests do."""
    status = admin.status(controller, credential=credential)
    workers = [w for w in status.workers if w.state == "ready" and w.HasField("worker")]
    served = model or (workers[0].model if workers else "")
    workers = [w for w in workers if w.model in ("", served)]
    prompts = [w.worker.description for w in workers if w.role != worker_pb2.ROLE_DECODE]
    decoders = [w.worker.description for w in workers if w.role != worker_pb2.ROLE_PREFILL]
    if not prompts or not decoders:
        raise Unavailable(f"no prefill and decode workers are ready at {controller}")
    limits = Limits(
        context=min(each.context_length for each in (*prompts, *decoders)),
        chunk=min(each.chunk_tokens for each in prompts),
        block=decoders[0].layout.block_size,
        pool=min(each.num_blocks * each.layout.block_size for each in decoders),
        batch=min(each.max_batch for each in decoders),
        decoders=len(decoders),
        neighbours=sum(w.role == worker_pb2.ROLE_PREFILL for w in workers) if status.local else 0,
    )
    chunks = {each.name: each.chunk_tokens for each in prompts}
    async with AsyncClient(target, tls=tls) as client:
        measurement = Measurement(
            client, limits, chunks, seconds, model, seed=time.time_ns(), progress=progress
        )
        await measurement.run()
    if not measurement.prompts or not measurement.steps:
        raise Unavailable(
            f"{len(measurement.prompts)} prompts and {len(measurement.steps)} steps could be "
            f"measured in {seconds:g} s; give it longer"
        )
    progress("links: each pair of workers")
    proof = credentials.find(controller, credential)
    pairs = [
        pair
        for pair in doctor.examine(status, controller=controller, credentials=proof).pairs
        if pair.outcome == "ok" and pair.bytes_per_s
    ]
    fitted = fit(measurement.prompts, measurement.steps)
    found = replace(
        fitted.profile,
        contention=contention(measurement.beside, fitted.profile),
        **_of_members(workers, decoders[0]),
        **_of_links(pairs),
    )
    return Profiled(found, fitted, len(pairs), tuple(_notes(status, workers, decoders[0])))


def to_yaml(found: Profiled, cluster: str) -> str:
    """The profile's fields, as `profile:` in a cluster's YAML and `crossdock sim --profile` take
    them, below a comment on how good they are."""
    kinds = (("prefill", found.fit.prefill), ("decode", found.fit.decode))
    lines = [f"# Measured of {cluster}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."]
    lines += [
        f"# {kind}: {each.count} measurements, error of the fit {each.median:.1%} median, "
        f"{each.p90:.1%} p90."
        for kind, each in kinds
    ]
    lines += [f"# {note}" for note in found.notes]
    return "\n".join(lines) + "\n" + yaml.safe_dump(asdict(found.profile), sort_keys=False)


def _of_members(
    workers: Sequence[admin_pb2.MemberStatus], of: worker_pb2.WorkerDescription
) -> dict[str, Any]:
    starts = [member.start_s for member in workers if member.start_s]
    return {
        "kv_bytes_per_token": max(8, of.block_bytes // of.layout.block_size),
        "start_s": round(statistics.median(starts), 2) if starts else 0.0,
        "gpus": math.ceil(of.gpus),
        "kv_memory_mb": of.num_blocks * of.block_bytes >> 20,
    }


def _of_links(pairs: Sequence[PairFacts]) -> dict[str, Any]:
    if not pairs:
        return {}
    return {
        "link_latency_s": float(f"{statistics.median(p.latency_s for p in pairs):.3g}"),
        "link_bytes_per_s": float(f"{statistics.median(p.bytes_per_s for p in pairs):.3g}"),
    }


def _notes(
    status: admin_pb2.ClusterStatus,
    workers: Sequence[admin_pb2.MemberStatus],
    of: worker_pb2.WorkerDescription,
) -> list[str]:
    notes = []
    if any(w.worker.load.running or w.worker.load.waiting for w in workers):
        notes.append("The cluster served others meanwhile: measure again while it is idle.")
    if of.layout.engine == "simulated":
        notes.append("kv_bytes_per_token is what a simulated engine keeps, not what it stands for.")
    if status.local and len(workers) > 1:
        notes.append(
            "All workers are on one host: `contention` is what they cost each other there."
        )
        notes.append("Set it to 0 to simulate workers that have hardware of their own.")
    return notes
