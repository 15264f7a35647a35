"""How `crossdock explain` shows where a request went, why, and what it took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from crossdock.proto.v1 import admin_pb2
from crossdock.tables import table

if TYPE_CHECKING:
    from rich.console import Console

# What a policy that predicts nothing goes by, by its reason.
NUMBERS = {
    "least_loaded": "sequences",
    "short_prefix": "sequences",
    "imbalanced": "sequences",
    "longest_prefix": "cached blocks",
    "least_cost": "cost, blocks",
    "sampled_cost": "cost, blocks",
}
NEVER_S = 1e5  # so many predicted seconds are a pair whose pulls fail

Row = tuple[object, ...]


def show(found: admin_pb2.ExplainedRequest, console: Console) -> None:
    """Prints a request: each sequence's placements, then what was predicted and what it took."""
    state = "runs for" if found.running else f"{found.error or 'ended'} after"
    about = f"gateway {found.gateway}  model {found.model}  policy {found.policy}"
    console.print(f"request [bold]{found.request_id}[/bold]  {about}", soft_wrap=True)
    console.print(f"{state} {_seconds(found.seconds)}", markup=False)
    for sequence in found.sequences:
        _show_sequence(sequence, console, several=len(found.sequences) > 1)


def took(sequence: admin_pb2.ExplainedSequence) -> Iterator[tuple[str, float | None, float | None]]:
    """What happened, the seconds that were predicted for it and those that it took. A prediction is
    of the first placement that was acted on; None is not known."""
    stages = {stage.name: stage.seconds for stage in sequence.stages}
    sent = next((each for each in sequence.placements if each.sequence_id), None)
    parts = sent.predicted if sent is not None else None
    times = sequence.timings
    first = times.first_token if times.HasField("first_token") else None
    yield "admission", None, stages.get("admission")
    yield "waiting for its turn", None, stages.get("routing")
    yield "queue", parts.queue_s if parts else None, stages.get("prefill_queue")
    yield "prompt", parts.prompt_s if parts else None, stages.get("prefill")
    yield "delivery", None, stages.get("delivery")
    ttft_s = parts.queue_s + parts.prompt_s if parts else None
    placed_s = None if first is None else first - times.routed
    yield "first token, once placed", ttft_s, placed_s
    yield "first token (TTFT)", None, first
    if sent is not None and sent.prefill:
        yield "transfer", parts.transfer_s if parts else None, sequence.transfer_s or None
        for name in ("decode_queue", "reserve", "pull", "fence", "first_step"):
            if name in stages:
                yield f"hand-off: {name}", None, stages[name]
    yield "per token (TPOT)", None, sequence.tpot_s or None


def _show_sequence(sequence: admin_pb2.ExplainedSequence, console: Console, several: bool) -> None:
    name = f"sequence {sequence.index}: " if several else ""
    prompt = f"{sequence.prompt_tokens} prompt tokens, {sequence.cached_tokens} cached"
    ended = f", {sequence.finish_reason}" if sequence.finish_reason else ""
    line = f"{name}{prompt}; {sequence.generated_tokens} generated{ended}"
    console.print(line, markup=False)
    for placement in sequence.placements:
        _show_placement(placement, console)
    if not sequence.placements:
        console.print("it was not placed")
    rows = [
        (what, _seconds(predicted), _seconds(measured))
        for what, predicted, measured in took(sequence)
        if predicted is not None or measured is not None
    ]
    if rows:
        figures = ("predicted", "took")
        console.print(table("predicted and took", ("", *figures), rows, figures))


def _show_placement(placement: admin_pb2.ExplainedPlacement, console: Console) -> None:
    where = " → ".join(name for name in (placement.prefill, placement.decode) if name)
    ttft_s = placement.predicted.queue_s + placement.predicted.prompt_s
    known = "" if placement.measured else ", from nothing measured lately"
    console.print(
        f"placed at {_seconds(placement.at_s)} on {where}: {placement.reason}; first token "
        f"predicted in {_seconds(ttft_s)}{known}; {placement.uncached_tokens} tokens to compute "
        f"after {placement.cached_blocks} cached blocks",
        markup=False,
        soft_wrap=True,
    )
    _show_candidates("may compute the prompt", placement.computing, placement.reason, console)
    why = placement.decode_reason or placement.reason
    _show_candidates(f"may decode after {placement.prefill}", placement.decoding, why, console)
    if placement.sequence_id:
        moved = placement.decoded_on not in ("", placement.decode)
        console.print(
            f"sent as {placement.sequence_id}"
            + (f"; decoded on {placement.decoded_on} in the end" if moved else ""),
            markup=False,
        )
    if placement.gave_up:
        console.print(f"given up: {placement.gave_up}", markup=False, style="red")


def _show_candidates(
    title: str, candidates: Iterable[admin_pb2.Candidate], reason: str, console: Console
) -> None:
    candidates = list(candidates)
    if not candidates:
        return
    if candidates[0].HasField("parts"):
        names = [n for n in _PARTS if any(getattr(c.parts, f"{n}_s") for c in candidates)]
        figures = (*names, "sum", "with the best decode worker", "cached blocks")
        rows = [_predicted_row(each, names) for each in candidates]
        if not any(each.HasField("all_s") for each in candidates):
            figures, rows = figures[:-2], [row[:-2] for row in rows]
    else:
        figures = (NUMBERS.get(reason, "number"),)
        rows = [(_name(each), f"{each.number:g}") for each in candidates]
    console.print(table(title, ("worker", *figures), rows, figures))


def _predicted_row(candidate: admin_pb2.Candidate, names: Iterable[str]) -> Row:
    parts = {name: getattr(candidate.parts, f"{name}_s") for name in _PARTS}
    all_s = candidate.all_s if candidate.HasField("all_s") else None
    told = [_seconds(parts[name]) for name in names]
    sums = _seconds(sum(parts.values())), _seconds(all_s)
    return (_name(candidate), *told, *sums, candidate.cached_blocks)


def _name(candidate: admin_pb2.Candidate) -> str:
    return f"{'▶' if candidate.chosen else ' '} {candidate.worker}"


def _seconds(seconds: float | None) -> str:
    """Readable from microseconds on; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds >= NEVER_S:
        return "pulls fail"
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


_PARTS = ("queue", "prompt", "eviction", "transfer", "stream")
