"""`crossdock explain`: what of a request it prints."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_kit import fake_admin, run

from crossdock.explanation import took
from crossdock.proto.errors import NotFound
from crossdock.proto.v1 import admin_pb2 as pb
from crossdock.proto.v1 import inference_pb2


def parts(*seconds: float) -> pb.PredictedParts:
    names = ("queue_s", "prompt_s", "eviction_s", "transfer_s", "stream_s")
    return pb.PredictedParts(**dict(zip(names, seconds)))


def request() -> pb.ExplainedRequest:
    computing = [
        pb.Candidate(worker="prefill-0", parts=parts(0.5, 0.02), cached_blocks=9, all_s=0.53),
        pb.Candidate(worker="prefill-1", chosen=True, parts=parts(0, 0.2), all_s=0.212),
        pb.Candidate(worker="prefill-2", parts=parts(1.5, 0.2)),
    ]
    decoding = [
        pb.Candidate(worker="decode-0", chosen=True, parts=parts(0, 0, 0, 0.012)),
        pb.Candidate(worker="decode-1", parts=parts(0, 0, 0, 1e6, 0.25)),
    ]
    first = pb.ExplainedPlacement(
        at_s=0.001,
        sequence_id="gateway-0-ab-7",
        reason="quickest_pair",
        prefill="prefill-1",
        decode="decode-0",
        decoded_on="decode-1",
        uncached_tokens=1024,
        measured=True,
        predicted=parts(0, 0.2, 0, 0.012),
        computing=computing,
        decoding=decoding,
        gave_up="worker lost on decode-1",
    )
    second = pb.ExplainedPlacement(
        at_s=0.9,
        sequence_id="gateway-0-ab-9",
        reason="quickest_local",
        decode="decode-0",
        decoded_on="decode-0",
        predicted=parts(0.01, 0.02),
    )
    stages = {"admission": 0.001, "routing": 0.003, "prefill_queue": 0.1, "prefill": 0.25}
    sequence = pb.ExplainedSequence(
        prompt_tokens=1024,
        generated_tokens=64,
        finish_reason="length",
        placements=[first, second],
        timings=inference_pb2.Timings(routed=0.004, first_token=0.36),
        stages=[pb.Stage(name=name, seconds=s) for name, s in stages.items()],
        transfer_s=0.015,
        tpot_s=0.008,
    )
    about = {"request_id": "abc", "gateway": "gateway-0", "model": "m", "policy": "predicted"}
    return pb.ExplainedRequest(**about, seconds=1.25, sequences=[sequence])


def rows(out: str) -> dict[str, list[str]]:
    """Cells by the first of each line of the tables; of equal ones the first."""
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        if line.startswith("│"):
            name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
            found.setdefault(name, cells)
    return found


def test_a_request_is_shown_with_what_was_weighed_and_what_it_took(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def explain(request_id: str, address: str, **_: Any) -> pb.ExplainedRequest:
        asked.append((request_id, address))
        return request()

    fake_admin(monkeypatch, explain=explain)
    code, out, _ = run(capsys, "explain", "chatcmpl-abc", "--address", "127.0.0.1:9")
    assert (code, asked) == (0, [("chatcmpl-abc", "127.0.0.1:9")])
    assert "request abc  gateway gateway-0  model m  policy predicted" in out
    assert "ended after 1.250 s" in out
    assert "placed at 1.00 ms on prefill-1 → decode-0: quickest_pair; first token predicted" in out
    assert "sent as gateway-0-ab-7; decoded on decode-1 in the end" in out
    assert "given up: worker lost on decode-1" in out
    assert "placed at 900.00 ms on decode-0: quickest_local" in out
    assert "from nothing measured lately" in out
    shown = rows(out)
    assert shown["prefill-0"] == ["500.00 ms", "20.00 ms", "520.00 ms", "530.00 ms", "9"]
    assert shown["▶ prefill-1"] == ["0.00 ms", "200.00 ms", "200.00 ms", "212.00 ms", "0"]
    assert shown["prefill-2"] == ["1.500 s", "200.00 ms", "1.700 s", "", "0"]
    assert shown["▶ decode-0"] == ["12.00 ms", "0.00 ms", "12.00 ms"]
    assert shown["decode-1"] == ["pulls fail", "250.00 ms", "pulls fail"]
    assert shown["prompt"] == ["200.00 ms", "250.00 ms"]
    assert shown["first token, once placed"] == ["200.00 ms", "356.00 ms"]
    assert shown["transfer"] == ["12.00 ms", "15.00 ms"]
    code, out, _ = run(capsys, "explain", "abc", "--json")
    first = json.loads(out)["sequences"][0]["placements"][0]
    assert first["computing"][1]["chosen"] and first["predicted"]["prompt_s"] == 0.2


def test_policies_that_predict_nothing_show_what_they_go_by(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = request()
    placement = shown.sequences[0].placements[0]
    placement.reason, placement.decode_reason = "longest_prefix", "short_prefix"
    del placement.computing[:], placement.decoding[:]
    placement.computing.add(worker="prefill-1", number=64, chosen=True)
    placement.decoding.add(worker="decode-0", number=3, chosen=True)
    fake_admin(monkeypatch, explain=lambda **_: shown)
    _, out, _ = run(capsys, "explain", "abc")
    assert "cached blocks" in out and "sequences" in out
    assert rows(out)["▶ prefill-1"] == ["64"] and rows(out)["▶ decode-0"] == ["3"]


def test_one_that_was_refused_or_runs_is_shown_as_far_as_it_is_known(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = pb.ExplainedRequest(request_id="abc", seconds=0.01, error="Overloaded")
    shown.sequences.add(prompt_tokens=5)
    fake_admin(monkeypatch, explain=lambda **_: shown)
    _, out, _ = run(capsys, "explain", "abc")
    assert "Overloaded after 10.00 ms" in out and "it was not placed" in out
    assert "took" not in out, "a table without a line says nothing"
    shown.running, shown.error = True, ""
    assert "runs for 10.00 ms" in run(capsys, "explain", "abc")[1]
    assert not [each for each in took(shown.sequences[0]) if each[1:] != (None, None)]


def test_an_id_that_nobody_knows_is_an_error(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(request_id: str, **_: Any) -> pb.ExplainedRequest:
        raise NotFound(f"request {request_id!r} is not known to any of 2 gateways")

    fake_admin(monkeypatch, explain=explain)
    code, out, error = run(capsys, "explain", "x")
    assert (code, out) == (1, "")
    assert error == "error: request 'x' is not known to any of 2 gateways\n"
