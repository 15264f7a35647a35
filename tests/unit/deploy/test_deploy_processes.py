"""What is found in /proc, and what Ray's nodes are asked for: without a Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from crossdock.deploy import actors, processes
from crossdock.deploy.runtime import Placement

NODES = [
    {"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0, "node:__internal_head__": 1.0}},
    {"Alive": True, "Labels": {"pool": "a"}, "Resources": {"CPU": 8.0, "GPU": 1.0, "rack": 2.0}},
    {"Alive": False, "Labels": {"pool": "b"}, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    "placement, problem",
    [
        (Placement(cpus=8), ""),
        (Placement(cpus=1, gpus=1, labels={"pool": "a"}), ""),
        (Placement(cpus=9), "no fitting node has 9 of CPU; the most is 8"),
        (Placement(cpus=1, labels={"pool": "b"}), "has the labels pool=b"),
        (Placement(gpus=2, labels={"pool": "a"}), "no fitting node has 2 of GPU; the most is 1"),
        (Placement(custom={"rack": 3.0}), "3 of rack; the most is 2"),
        (Placement(custom={"shelf": 1.0}), "1 of shelf; the most is 0"),
    ],
)
def test_what_no_node_can_take_is_said(placement, problem):
    found = actors.placement_problem(placement, NODES)
    assert problem in found and bool(found) == bool(problem)


CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', SLEEP]); time.sleep(60)"
)
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def test_all_descendants_are_found_and_ended():
    code = f"SLEEP = {STUBBORN!r}; {CHILD}"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        deadline = time.monotonic() + 20
        while len(ours := below(child.pid)) < 2:
            assert time.monotonic() < deadline
        assert ours[0].pid == child.pid
        assert all(processes.alive(process) for process in ours)
        processes.end_all(ours, grace_s=0.0)
        child.wait(20)
    while any(processes.alive(process) for process in ours):
        assert time.monotonic() < deadline


def below(pid: int) -> list[processes.ProcessId]:
    found = processes.descendants(os.getpid())
    return [p for p in found if p.pid == pid] + processes.descendants(pid)


def test_a_number_used_again_is_another_process():
    [me] = [p for p in processes.descendants(os.getppid()) if p.pid == os.getpid()]
    assert processes.alive(me)
    assert not processes.alive(processes.ProcessId(me.pid, "1"))
