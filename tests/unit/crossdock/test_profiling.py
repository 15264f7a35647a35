"""Fitting a profile, and measuring what it is fitted to."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from engines_kit import simulated, start_engines

from crossdock.client import AsyncClient
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.profiling.fit import (
    Beside,
    Fit,
    PromptTime,
    Residuals,
    StepTime,
    contention,
    fit,
)
from crossdock.profiling.measure import Limits, Measurement, Stream, steps_of
from crossdock.profiling.session import Profiled, to_yaml
from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import check_settings
from crossdock.proto.types import Role
from crossdock.results import Timings

TRUE = Profile(
    prefill_s=3e-3,
    prefill_token_s=2.6e-5,
    prefill_attention_s=1.1e-9,
    decode_s=5e-3,
    decode_sequence_s=1.7e-5,
    decode_context_s=3.4e-8,
)
TERMS = [name for name in asdict(TRUE) if name.startswith(("prefill", "decode"))]


def measured(noise: float, pauses: int, seed: int = 7) -> tuple[list[PromptTime], list[StepTime]]:
    rng = random.Random(seed)
    prompts, steps = [], []
    for _ in range(3):
        for length in (16, 64, 256, 1024, 4096, 16_384, 32_768):
            for start in (0, length // 2):
                prompts.append(PromptTime.of(start, start + length, 8192, 1.0))
    for sequences in (1, 4, 16, 64):
        for each in (64, 1000, 8000):
            steps += [StepTime(sequences, float(sequences * each), 1.0)] * 3
    prompts = [replace(p, seconds=p.expected_s(TRUE) * rng.gauss(1, noise)) for p in prompts]
    steps = [replace(s, seconds=s.expected_s(TRUE) * rng.gauss(1, noise)) for s in steps]
    for some in (prompts, steps):
        for at in rng.sample(range(len(some)), pauses):
            some[at] = replace(some[at], seconds=some[at].seconds * 4)
    return prompts, steps


def test_exact_times_give_the_profile_back() -> None:
    found = fit(*measured(noise=0.0, pauses=0))
    for term in TERMS:
        assert getattr(found.profile, term) == pytest.approx(getattr(TRUE, term), rel=2e-3), term
    assert found.prefill.p90 < 1e-3
    assert found.decode.count == 36


def test_pauses_of_the_machine_do_not_bend_the_fit() -> None:
    prompts, steps = measured(noise=0.03, pauses=5)
    found = fit(prompts, steps)
    for each in measured(noise=0.0, pauses=0)[0]:
        assert each.expected_s(found.profile) == pytest.approx(each.seconds, rel=0.06)
    for step in measured(noise=0.0, pauses=0)[1]:
        assert step.expected_s(found.profile) == pytest.approx(step.seconds, rel=0.06)
    assert found.decode.median < 0.05 < found.decode.p90 + 0.05


def test_no_term_is_negative_and_what_does_not_vary_is_not_guessed() -> None:
    """Times that fall as prompts grow; one step that was seen ten times."""
    prompts = [PromptTime.of(0, length, 64, 1.0 / length) for length in (8, 16, 32)]
    found = fit(prompts, [StepTime(1, 100.0, 0.02)] * 10).profile
    assert min(getattr(found, term) for term in TERMS) >= 0
    assert StepTime(1, 100.0, 0.0).expected_s(found) == pytest.approx(0.02)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 prompts and 1 steps"):
        fit([], [StepTime(1, 1.0, 1.0)])


def test_what_neighbours_cost_is_the_mean_of_both_kinds_of_work() -> None:
    def beside(work: PromptTime | StepTime, times: float, others: int) -> Beside:
        return Beside(replace(work, seconds=times * work.expected_s(TRUE)), others)

    prompt, step = PromptTime.of(0, 512, 256, 0.0), StepTime(4, 400.0, 0.0)
    found = [beside(prompt, 1.4, 1), beside(prompt, 1.4, 1), beside(prompt, 9.0, 1)]
    found += [beside(step, 1.6, 1), beside(step, 2.2, 3)]
    assert contention(found, TRUE) == pytest.approx((0.5, 0.5, 1.2))
    assert contention(found[:3], TRUE) == pytest.approx((0.4,))
    assert contention([beside(step, 0.9, 1)], TRUE) == (0.0,)
    assert contention([], TRUE) == ()


def test_more_neighbours_than_were_measured_cost_as_much_each() -> None:
    shared = replace(TRUE, contention=(0.1, 0.6))
    assert [shared.slowdown(others) for others in range(5)] == pytest.approx(
        [1, 1.1, 1.6, 1.9, 2.2]
    )
    assert TRUE.slowdown(3) == 1.0
    with pytest.raises(ConfigError, match=r"profile.contention\[1\].*-1"):
        check_settings(replace(TRUE, contention=(0.5, -1.0)), "profile.")


def stream(worker: str, prompt: int, *arrivals: float) -> Stream:
    return Stream(prompt, [(at, 1) for at in arrivals], 0, Timings({}, decode_worker=worker))


def test_steps_are_counted_from_when_all_decode_and_by_worker() -> None:
    early = stream("d0", 100, *(i * 0.01 for i in range(40)))
    late = stream("d0", 50, 0.095, *(0.105 + i * 0.01 for i in range(20)))
    other = stream("d1", 10, *(i * 0.02 for i in range(20)))
    found = {(s.sequences, round(s.seconds, 6)): s for s in steps_of([early, late, other], 100)}
    assert set(found) == {(2, 0.01), (1, 0.01), (1, 0.02)}
    both = found[2, 0.01]
    assert 150 < both.context < 150 + 2 * 30


def test_several_tokens_in_a_message_are_several_steps() -> None:
    arrivals = [(i * 0.02, 2) for i in range(12)]
    (found,) = steps_of([Stream(8, arrivals, 0, Timings({}, decode_worker="d"))], 100)
    assert found.seconds == pytest.approx(0.01)


async def test_a_real_cluster_is_measured_by_what_its_workers_say() -> None:
    """A simulated engine never takes less than its profile says, however busy the machine is."""
    pace = replace(TRUE, prefill_token_s=2e-5, prefill_attention_s=1e-7, kv_bytes_per_token=64)
    roles = (Role.PREFILL, Role.DECODE)
    async with start_engines(*roles, engine=simulated(profile=pace)) as rig:
        limits = Limits(context=600, chunk=32, block=8, pool=4000, batch=4, decoders=1)
        async with AsyncClient(rig.gateway.grpc_address) as client:
            measurement = Measurement(client, limits, {"prefill-0": 32}, seconds=2.0)
            await measurement.run()
        await rig.settled()
    assert len({each.tokens for each in measurement.prompts}) >= 4
    behind = [each for each in measurement.prompts if each.attention > each.tokens**2]
    assert behind, "no prompt was computed behind a cached prefix"
    for prompt in measurement.prompts:
        assert prompt.seconds > prompt.expected_s(pace) - 2e-3, "wall clocks have milliseconds"
    assert {1, 4} <= {each.sequences for each in measurement.steps}
    assert min(each.seconds for each in measurement.steps) > 0
    fit(measurement.prompts, measurement.steps)


async def test_prompts_are_measured_beside_decodes_where_they_share_a_host() -> None:
    pace = Profile(prefill_token_s=2e-4, decode_s=3e-3, kv_bytes_per_token=64)
    async with start_engines(Role.PREFILL, Role.DECODE, engine=simulated(profile=pace)) as rig:
        limits = Limits(
            context=600, chunk=32, block=8, pool=4000, batch=4, decoders=1, neighbours=1
        )
        async with AsyncClient(rig.gateway.grpc_address) as client:
            measurement = Measurement(client, limits, {"prefill-0": 32}, seconds=2.0)
            await measurement.run()
        await rig.settled()
    kinds = {type(each.work) for each in measurement.beside}
    assert kinds == {PromptTime, StepTime}
    assert {each.others for each in measurement.beside} == {1}
    for each in measurement.beside:
        assert each.work.seconds > each.work.expected_s(pace) - 2e-3, (
            "wall clocks have milliseconds"
        )


async def test_workers_that_do_both_are_measured_too() -> None:
    pace = Profile(prefill_s=1e-3, decode_s=2e-3, kv_bytes_per_token=64)
    async with start_engines(Role.COLOCATED, engine=simulated(profile=pace)) as rig:
        limits = Limits(context=200, chunk=32, block=8, pool=4000, batch=1, decoders=1)
        async with AsyncClient(rig.gateway.grpc_address) as client:
            measurement = Measurement(client, limits, {"colocated-0": 32}, seconds=0.5)
            await measurement.run()
    assert len(measurement.prompts) >= 2 and measurement.steps


def test_what_is_written_is_a_profile_of_the_yaml(tmp_path: Path) -> None:
    errors = Residuals(10, 0.01, 0.03)
    shared = replace(TRUE, contention=(0.1, 0.5))
    found = Profiled(shared, Fit(shared, errors, errors), 1, ("Measured at noon.",))
    text = to_yaml(found, "127.0.0.1:50050")
    assert "# prefill: 10 measurements, error of the fit 1.0% median, 3.0% p90." in text
    assert "# Measured at noon." in text
    pool = {"engine": {"kind": "simulated", "profile": yaml.safe_load(text)}}
    pools = {role: {"role": role, **pool} for role in ("prefill", "decode")}
    spec = {"metadata": {"name": "p"}, "model": {"id": "simulated"}, "pools": pools}
    parsed = ClusterSpec.parse(yaml.safe_dump(spec))
    assert parsed.pools["decode"].engine.profile == shared
