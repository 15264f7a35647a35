"""The page of a simulation: it holds what the runs were like, and needs nothing but itself."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_sim import AUTOSCALED, PROFILE, SPEC, shaped, spec_of, trace_of
from typer.testing import CliRunner

from crossdock.bench.traces import Trace, write_mooncake
from crossdock.cli import app
from crossdock.deploy.spec import ClusterSpec
from crossdock.sim.cluster import SimCluster
from crossdock.sim.page import page, run_of
from crossdock.sim.report import report
from crossdock.sim.samples import ENOUGH, MOST, Samples


class _Parsed(HTMLParser):
    """The scripts of a page by type, what its elements load, and whether all are closed."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.loaded: list[str] = []
        self.open: list[str] = []
        self._type = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._type = dict(attrs).get("type") or tag
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self._type] = self.scripts.get(self._type, "") + text

    @property
    def data(self) -> Any:
        return json.loads(self.scripts["application/json"])


def sampled(spec: ClusterSpec, trace: Trace) -> tuple[SimCluster, Samples]:
    cluster = SimCluster(spec, PROFILE)
    samples = Samples(cluster, trace)
    cluster.run(trace)
    return cluster, samples


def test_the_command_writes_a_page_of_its_policies_and_rates(tmp_path: Path) -> None:
    trace, cluster, out = (tmp_path / name for name in ("t.jsonl", "c.yaml", "out.html"))
    write_mooncake(shaped(60), trace)
    cluster.write_text(SPEC)
    line = [str(trace), "--cluster", str(cluster), "--profile", "cpu-135m", "--html", str(out)]
    line += ["--policy", "predicted_latency", "--policy", "round_robin"]
    ran = CliRunner().invoke(app, ["sim", *line, "--rate-scale", "0.2", "--rate-scale", "0.5"])
    assert ran.exit_code == 0, ran.output
    text = out.read_text(encoding="utf-8")
    parsed = _Parsed(text)
    assert not parsed.open and not parsed.loaded
    assert not re.search(r"https?:|//[a-z]|url\(|@import|import\(|fetch", text)
    data = parsed.data
    assert [(each["policy"], each["scale"]) for each in data["runs"]] == [
        (policy, scale) for scale in (0.2, 0.5) for policy in ("predicted_latency", "round_robin")
    ]
    for run in data["runs"]:
        assert len(run["cells"]) == len(data["columns"])
        samples = run["samples"]
        assert len(samples["at"]) > ENOUGH / 2
        assert set(samples["pools"]) == {"prefill", "decode"}
        lines = [samples["queued"], *samples["pools"]["decode"].values()]
        assert {len(each) for each in lines} == {len(samples["at"])}
        assert max(samples["pools"]["decode"]["running"]) > 0
        assert 0 < max(samples["pools"]["decode"]["used"]) <= 1
        assert max(samples["pools"]["prefill"]["cached"]) > 0
        windows = run["windows"]
        assert sum(windows["requests"]) == 60
        good = sum(n * (met or 0) for n, met in zip(windows["requests"], windows["met"]))
        assert good == pytest.approx(60 * run["attainment"], rel=1e-3)
        assert len(run["ttft"]) == len(data["percentiles"]) and run["ttft"] == sorted(run["ttft"])


def test_samples_change_nothing_and_are_few_however_long_it_takes() -> None:
    spec = spec_of(prefill=1, decode=1)
    quick = shaped(200, rate=400.0)  # all come within half a second, and are served for minutes
    cluster, samples = sampled(spec, quick)
    alone = SimCluster(spec, PROFILE)
    alone.run(quick)
    assert report("p", cluster, spec.slo) == report("p", alone, spec.slo)
    at = [each.at_s for each in samples.taken]
    assert ENOUGH <= len(at) < MOST
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert max(gaps) == pytest.approx(min(gaps))
    assert at[0] == 0 and at[-1] + gaps[0] > cluster.served[0].ended_s
    assert max(each.queued for each in samples.taken) > 50


def test_workers_come_and_decisions_say_why() -> None:
    spec = ClusterSpec.parse(AUTOSCALED + "autoscale: {interval_s: 2}\n")
    rows = [(n / 20, 800, 20, tuple(range(50 * n, 50 * n + 50))) for n in range(400)]
    cluster, samples = sampled(spec, trace_of(*rows))
    run = run_of(1.0, report("p", cluster, spec.slo), [], cluster, samples)
    assert run["autoscaled"] == ["prefill", "decode"]
    grown = next(each for each in run["decisions"] if each["pool"] == "prefill")
    assert grown["target"] > grown["before"] == 2 and grown["reason"]
    prefill = run["samples"]["pools"]["prefill"]
    assert prefill["ready"][0] == 2 and max(prefill["ready"]) >= grown["target"]


def test_no_name_breaks_out_of_the_page() -> None:
    name = "</script><script>alert(1)</script><!--@DATA@ & \u2028.jsonl"
    cluster, samples = sampled(spec_of(), trace_of((0.0, 100, 1, tuple(range(7)))))
    told = report(name, cluster, cluster.spec.slo)
    text = page(name, ["policy"], [run_of(1.0, told, [name], cluster, samples)])
    parsed = _Parsed(text)
    assert not parsed.open and "alert(1)" not in parsed.scripts["script"]
    assert text.count("<script") == 2
    assert parsed.data["title"] == name and parsed.data["runs"][0]["policy"] == name
    assert parsed.data["runs"][0]["tpot"] == [], "one token has no time after it"
