"""Load test of a gRPC or OpenAI endpoint: workload in, report out.

The report is one JSON object: `machine` (of the load generator), `config`, `workload`, `results`
(metrics of crossdock.bench.metrics), `errors` by kind, and the `formulas` of all metrics.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from crossdock.bench.load import Endpoint, Job, closed_loop, open_endpoint, open_loop, send
from crossdock.bench.metrics import (
    LATENCIES,
    RequestRecord,
    Run,
    count_errors,
    explain,
    parse_slo,
    summarize,
)
from crossdock.bench.traces import (
    PromptMaker,
    SyntheticOptions,
    Trace,
    TraceOptions,
    arrival_times,
    load_trace,
    random_workload,
    replay,
    synthesize,
)
from crossdock.client import Tls
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.settings import GATEWAY_ADDRESS

DEFAULT_ENDPOINT = f"grpc://{GATEWAY_ADDRESS}"
DEFAULT_CONCURRENCY = 8
# With a duration and no number of requests, this many are prepared for each second of it.
PREPARED_PER_SECOND = 100
STYLES = ("text", "ids", "chat")


@dataclass(frozen=True)
class BenchConfig:
    """One load test. Lengths are tokens, ranges inclusive, times seconds; 0 = not given."""

    endpoint: str = DEFAULT_ENDPOINT
    model: str = ""
    style: str = "text"  # of an OpenAI endpoint's prompts: text, ids or chat
    concurrency: int = 0
    rate: float = 0.0
    constant: bool = False  # equal gaps instead of a Poisson process
    num_requests: int = 0
    duration_s: float = 0.0
    input_tokens: tuple[int, int] = (280, 280)
    output_tokens: tuple[int, int] = (32, 32)
    prefix_tokens: int = 0
    trace: str = ""
    synthetic: bool = False
    replay: TraceOptions = field(default_factory=TraceOptions)
    token_range: tuple[int, int] = (1000, 30000)  # ids of made-up prompts, the end excluded
    warmup: int = 2
    timeout_s: float = 600.0
    slo: str = ""
    seed: int = 0
    ca: str = ""  # PEM file; "": those that the machine trusts
    cert: str = ""  # PEM file of certificate and key, where the endpoint asks for one

    @property
    def tls(self) -> Tls | None:
        """None: as the endpoint's scheme says."""
        return Tls(self.ca, self.cert) if self.ca or self.cert else None

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the field, its value and its limit."""
        for name in ("concurrency", "num_requests", "prefix_tokens", "warmup", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("rate", "duration_s"):
            _at_least(name, getattr(self, name), 0.0)
        if not self.timeout_s > 0:
            raise InvalidRequest("timeout_s", self.timeout_s, "must be above 0")
        for name in ("input_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise InvalidRequest(name, f"{low}:{high}", "must be LENGTH or LOW:HIGH, from 1")
        if not 0 <= self.token_range[0] < self.token_range[1]:
            raise InvalidRequest("token_range", self.token_range, "must be LOW:HIGH, LOW < HIGH")
        if self.style not in STYLES:
            raise InvalidRequest("style", self.style, f"must be one of {', '.join(STYLES)}")
        if self.concurrency and self.rate:
            raise InvalidRequest("rate", self.rate, "give a rate or a concurrency, not both")
        if self.trace and self.synthetic:
            raise InvalidRequest("synthetic", True, "give a trace or synthetic, not both")
        if (self.trace or self.synthetic) and self.rate:
            limit = "a trace has its own times; scale them with time_scale"
            raise InvalidRequest("rate", self.rate, limit)
        if not self.replay.time_scale > 0:
            raise InvalidRequest("time_scale", self.replay.time_scale, "must be above 0")
        _at_least("jitter_s", self.replay.jitter_s, 0.0)
        parse_slo(self.slo)

    @property
    def has_times(self) -> bool:
        """Open loop: requests are sent at times of their own."""
        return bool(self.rate or ((self.trace or self.synthetic) and not self.concurrency))


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark measured, and how it was asked to."""

    config: BenchConfig
    run: Run
    workload: dict[str, Any]
    started: str  # UTC, ISO 8601

    @property
    def failed(self) -> int:
        """Requests that ended with an error."""
        return len(self.run.records) - len(self.run.succeeded)

    @property
    def results(self) -> dict[str, Any]:
        """The figures, by metric."""
        return summarize(self.run)

    def to_json(self, with_requests: bool = False) -> dict[str, Any]:
        """As a JSON document; with each request's record where asked for."""
        config = dataclasses.asdict(self.config)
        config["trace"] = Path(self.config.trace).name
        report: dict[str, Any] = {
            "started": self.started,
            "machine": describe_machine(),
            "config": config,
            "workload": self.workload,
            "results": self.results,
            "errors": count_errors(self.run.records),
            "formulas": dict(explain()),
        }
        if with_requests:
            report["requests"] = [dataclasses.asdict(record) for record in self.run.records]
        return report


def prepare(config: BenchConfig) -> tuple[list[Job], dict[str, Any]]:
    """The jobs of a run and a description of them. Pure: the same config, the same jobs."""
    trace, times = _workload(config)
    maker = PromptMaker(trace.block_size, *config.token_range, seed=config.seed)
    wants_text = config.endpoint.startswith("http") and config.style != "ids"
    jobs = [
        Job(
            index=index,
            due_s=times[index],
            token_ids=tuple(maker.token_ids(row)),
            text=maker.text(row) if wants_text else "",
            output_tokens=row.output_tokens,
        )
        for index, row in enumerate(trace.requests)
    ]
    return jobs, {
        "requests": len(jobs),
        "loop": "open" if config.has_times else "closed",
        "mean_input_tokens": sum(row.input_tokens for row in trace.requests) / len(jobs),
        "mean_output_tokens": sum(row.output_tokens for row in trace.requests) / len(jobs),
        "block_size": trace.block_size,
        "best_hit_rate": trace.hit_rate,
        "jitter_s": config.replay.jitter_s,
        "time_scale": config.replay.time_scale,
    }


def _workload(config: BenchConfig) -> tuple[Trace, list[float]]:
    if config.trace or config.synthetic:
        limit = config.num_requests or config.replay.limit
        options = dataclasses.replace(config.replay, seed=config.seed, limit=limit)
        if config.trace:
            trace = load_trace(Path(config.trace), options)
        else:
            count = options.limit or SyntheticOptions.requests
            trace = replay(synthesize(SyntheticOptions(count, seed=config.seed)), options)
        return trace, [row.at_s for row in trace.requests]
    count = config.num_requests or 100
    if config.duration_s and not config.num_requests:
        count = int(config.duration_s * max(config.rate * 1.5, PREPARED_PER_SECOND)) + 1
    trace = random_workload(
        count, config.input_tokens, config.output_tokens, config.prefix_tokens, config.seed
    )
    if not config.rate:
        return trace, [0.0] * count
    return trace, arrival_times(count, config.rate, not config.constant, config.seed)


async def run_bench(
    config: BenchConfig,
    on_start: Callable[[int], None] = lambda _: None,
    on_record: Callable[[RequestRecord], None] = lambda _: None,
    endpoint: Endpoint | None = None,
) -> BenchReport:
    """Warms up, sends, reports. Raises only where the load could not be started at all."""
    jobs, workload = prepare(config)
    opened = endpoint or open_endpoint(
        config.endpoint, config.model, config.timeout_s, config.style, config.tls
    )
    try:
        await _warm_up(opened, config)
        on_start(len(jobs))
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if config.has_times:
            records = await open_loop(opened, jobs, config.duration_s, on_record)
        else:
            concurrency = config.concurrency or DEFAULT_CONCURRENCY
            records = await closed_loop(opened, jobs, concurrency, config.duration_s, on_record)
    finally:
        await opened.close()
    return BenchReport(config, Run(tuple(records), parse_slo(config.slo)), workload, started)


async def _warm_up(endpoint: Endpoint, config: BenchConfig) -> None:
    """Requests of another seed, so that they leave no prefix behind that the run would hit."""
    seed = config.seed + 1_000_003
    short = dataclasses.replace(
        config,
        trace="",
        synthetic=False,
        rate=0.0,
        num_requests=max(1, config.warmup),
        input_tokens=(64, 64),
        output_tokens=(4, 4),
        prefix_tokens=0,
        seed=seed,
    )
    jobs, _ = prepare(short)
    for job in jobs[: config.warmup]:
        record = await send(endpoint, job, time.perf_counter())
        if not record.ok:
            raise ConnectionError(f"warm-up request failed: {record.error}: {record.message}")


def rows(report: BenchReport) -> tuple[list[list[str]], list[list[str]]]:
    """Totals as (name, value) and latencies as (name, mean, p50, p90, p99, max), in print."""
    results = report.results
    plain = {name: value for name, value in results.items() if not isinstance(value, dict)}
    totals = [[name, _number(value)] for name, value in plain.items()]
    latencies = [
        [name, *(_seconds(value) for value in results[f"{name}_s"].values())]
        for name in LATENCIES
        if f"{name}_s" in results
    ]
    return totals, latencies


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _seconds(value: float) -> str:
    return f"{value * 1000:,.1f} ms" if value < 10 else f"{value:,.2f} s"


def describe_machine() -> dict[str, Any]:
    """CPU, memory, accelerators and versions: what numbers depend on, and no names of hosts."""
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("crossdock", "torch", "ray", "nixl", "grpcio")
        },
    }


def _proc(path: str, key: str) -> str:
    try:
        lines: Sequence[str] = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return asked.stdout.splitlines() if asked.returncode == 0 else []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise InvalidRequest(name, value, f"must be {low} or more")
