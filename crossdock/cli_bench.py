"""Commands that load an endpoint and make workloads: bench, bench-trace."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from crossdock.bench.metrics import explain
from crossdock.cli_files import in_folder
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.settings import GATEWAY_ADDRESS
from crossdock.tables import console_of, table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from crossdock.bench.metrics import RequestRecord
    from crossdock.bench.run import BenchConfig, BenchReport

METRICS_HELP = "[bold]Metrics[/bold]\n\n" + "\n\n".join(
    f"[bold]{name}[/bold]: {formula}" for name, formula in explain()
)


def register(app: typer.Typer) -> None:
    """Adds `crossdock bench` to the command line."""
    app.command(epilog=METRICS_HELP)(bench)
    app.command("bench-trace")(bench_trace)


def bench(
    context: typer.Context,
    endpoint: Annotated[
        str, Option(help="grpc://host:port, or http://host:port of any OpenAI server.")
    ] = f"grpc://{GATEWAY_ADDRESS}",
    model: Annotated[str, Option(help="Model name; the server's first when empty.")] = "",
    ca: Annotated[
        str, Option(envvar="CROSSDOCK_CA", help="Trust this authority (PEM); grpc:// becomes TLS.")
    ] = "",
    cert: Annotated[
        str, Option(help="The client's own certificate and its key (PEM), where asked for.")
    ] = "",
    style: Annotated[
        str, Option(help="Prompts of an OpenAI endpoint: text, ids (token ids) or chat.")
    ] = "text",
    concurrency: Annotated[
        int, Option(min=0, help="Closed loop: so many requests at any time; 8 if unset.")
    ] = 0,
    rate: Annotated[float, Option(min=0, help="Open loop: requests a second.")] = 0.0,
    constant: Annotated[
        bool, Option("--constant", help="With --rate: equal gaps, not a Poisson process.")
    ] = False,
    num_requests: Annotated[
        int, Option(min=0, help="Requests to send; 100 if unset, or all of a trace.")
    ] = 0,
    duration: Annotated[float, Option(min=0, help="Send nothing new after s seconds.")] = 0.0,
    input_len: Annotated[str, Option(help="Prompt tokens: N, or LOW:HIGH uniform.")] = "280",
    output_len: Annotated[str, Option(help="Output tokens: N, or LOW:HIGH uniform.")] = "32",
    prefix_len: Annotated[
        int, Option(min=0, help="Of the prompt, how many leading tokens all share.")
    ] = 0,
    trace: Annotated[
        Path | None, Option(help="Replay a Mooncake .jsonl or an Azure .csv trace.")
    ] = None,
    synthetic: Annotated[
        bool,
        Option("--synthetic", help="A made-up trace of the same shape; see bench-trace."),
    ] = False,
    time_scale: Annotated[
        float, Option(help="Multiplies a trace's times: 0.5 is twice as fast.")
    ] = 1.0,
    jitter: Annotated[
        float, Option(min=0, help="Send each request of a trace up to s seconds late.")
    ] = 0.0,
    limit: Annotated[int, Option(min=0, help="Only the first rows of a trace; 0 is all.")] = 0,
    max_input: Annotated[int, Option(min=0, help="Cut a trace's prompts; 0 is off.")] = 0,
    max_output: Annotated[int, Option(min=0, help="Cut a trace's outputs; 0 is off.")] = 0,
    token_range: Annotated[
        str, Option(help="Ids of made-up prompts, LOW:HIGH; must be in the vocabulary.")
    ] = "1000:30000",
    warmup: Annotated[int, Option(min=0, help="Requests sent before, not measured.")] = 2,
    timeout: Annotated[float, Option(min=0.001, help="Seconds for each request.")] = 600.0,
    slo: Annotated[
        str, Option(help="Bounds for goodput, as ttft=2s,tpot=100ms; also itl and e2e.")
    ] = "",
    seed: Annotated[
        int | None,
        Option(
            min=0,
            help="Of all that is random here; drawn when unset, so that no prompt of an earlier "
            "run is found in a cache.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        Option("--json", callback=in_folder, help="Write the report to this file; - is stdout."),
    ] = None,
    requests_too: Annotated[
        bool, Option("--json-requests", help="With --json: every request's record too.")
    ] = False,
    allow_errors: Annotated[
        bool, Option("--allow-errors", help="Exit 0 although requests failed.")
    ] = False,
    explain_metrics: Annotated[
        bool, Option("--explain-metrics", help="Show each metric's formula and exit.")
    ] = False,
) -> None:
    """Load a gRPC or OpenAI endpoint and measure it. Greedy, streamed, exact output lengths."""
    if explain_metrics:
        for name, formula in explain():
            print(f"{name:<20} {formula}")
        return
    from crossdock.bench.run import BenchConfig
    from crossdock.bench.traces import TraceOptions

    seed = secrets.randbelow(1 << 31) if seed is None else seed
    own = {
        "duration_s": duration,
        "input_tokens": _span("--input-len", input_len),
        "output_tokens": _span("--output-len", output_len),
        "prefix_tokens": prefix_len,
        "trace": str(trace or ""),
        "replay": TraceOptions(limit, time_scale, jitter, max_input, max_output, seed),
        "token_range": _span("--token-range", token_range),
        "timeout_s": timeout,
        "seed": seed,
    }
    try:
        config = BenchConfig(**_fields(BenchConfig, context) | own)
    except InvalidRequest as error:
        raise typer.BadParameter(str(error)) from None
    to_stdout = json_file is not None and str(json_file) == "-"
    report = _run(config, console_of(stderr=to_stdout))
    if json_file is not None:
        text = json.dumps(report.to_json(requests_too), indent=2) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        else:
            json_file.write_text(text, encoding="utf-8")
    if report.failed and not allow_errors:
        raise typer.Exit(1)


def _fields(kind: type, context: typer.Context) -> dict[str, Any]:
    """The options that are called as fields of `kind`, a dataclass."""
    names = {about.name for about in fields(kind)}
    return {name: value for name, value in context.params.items() if name in names}


def _span(option: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise typer.BadParameter(f"{option}: {text!r} is not N or LOW:HIGH") from None


def _run(config: BenchConfig, console: Console) -> BenchReport:
    from crossdock.bench.run import run_bench

    progress = _progress(console)
    counts = {"tokens": 0, "failed": 0}

    def on_start(total: int) -> None:
        progress.add_task("requests", total=total, tokens=0, failed=0)

    def on_record(record: RequestRecord) -> None:
        counts["tokens"] += record.output_tokens
        counts["failed"] += not record.ok
        progress.update(progress.task_ids[0], advance=1, **counts)  # type: ignore[arg-type]

    with progress:
        report = asyncio.run(run_bench(config, on_start, on_record))
    show_report(report, console)
    return report


def _progress(console: Console) -> Progress:
    from rich import progress as bars

    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[tokens]} tok  {task.fields[failed]} failed"),
        bars.TimeElapsedColumn(),
        console=console,
    )


def show_report(report: BenchReport, console: Console) -> None:
    """Prints the figures as a table."""
    from rich.table import Table

    from crossdock.bench.metrics import PERCENTILES, count_errors
    from crossdock.bench.run import rows

    totals, latencies = rows(report)
    loop = f"{report.workload['loop']} loop"
    summary = Table(title=loop, title_justify="left", show_header=False)
    for total in totals:
        summary.add_row(*total)
    columns = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
    console.print(summary)
    names = ("latency", *columns)
    console.print(table("of requests that succeeded", names, latencies, figures=columns))
    for kind, seen in count_errors(report.run.records).items():
        console.print(f"{seen['count']} × {kind}: {seen['example']}", markup=False, style="red")


def bench_trace(
    context: typer.Context,
    out: Annotated[Path, Argument(help="The .jsonl file to write, in Mooncake's columns.")],
    requests: Annotated[int, Option(min=1, help="Rows.")] = 1000,
    rate: Annotated[float, Option(help="Requests a second on average.")] = 3.0,
    burst: Annotated[
        float, Option(min=0, help="Arrivals come in steps of s seconds; 0 is Poisson.")
    ] = 3.0,
    mean_input: Annotated[float, Option(help="Mean new prompt tokens of a turn.")] = 420.0,
    mean_output: Annotated[float, Option(help="Mean output tokens.")] = 11.0,
    sigma: Annotated[float, Option(min=0, help="Spread of both, of the logarithm.")] = 0.9,
    continued: Annotated[
        float, Option(min=0, max=1, help="Share of requests that continue a conversation.")
    ] = 0.3,
    max_input: Annotated[int, Option(min=1, help="Longest prompt.")] = 4000,
    block_size: Annotated[int, Option(min=1, help="Tokens for each hash id.")] = 16,
    seed: Annotated[int, Option(min=0)] = 0,
) -> None:
    """Write a synthetic trace: bursts, long-tailed lengths, a block all share, growing chats."""
    from crossdock.bench.traces import SyntheticOptions, synthesize, write_mooncake

    for name in ("rate", "mean_input", "mean_output"):
        if not (value := context.params[name]) > 0:
            option = name.replace("_", "-")
            raise typer.BadParameter(f"--{option}: {value} must be above 0")
    trace = synthesize(SyntheticOptions(burst_s=burst, **_fields(SyntheticOptions, context)))
    write_mooncake(trace, out)
    made = trace.requests
    total: dict[str, Any] = {
        "requests": len(made),
        "mean input tokens": sum(each.input_tokens for each in made) / len(made),
        "mean output tokens": sum(each.output_tokens for each in made) / len(made),
        "seconds": made[-1].at_s,
        "best hit rate": trace.hit_rate,
    }
    print(", ".join(f"{name} {round(value, 3):,}" for name, value in total.items()))
