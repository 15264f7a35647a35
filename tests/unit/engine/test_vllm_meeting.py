"""What ranks of a vllm engine meet at is gone when they are, however they end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from crossdock.engine.vllm import meeting
from crossdock.engine.vllm.meeting import Meeting

HOLD = """
import sys, time
from pathlib import Path
from crossdock.engine.vllm.meeting import Meeting
Path(Meeting().method.removeprefix("file://")).write_text("ranks")
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(meeting, "_SHARED_MEMORY", tmp_path)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def held(folder: Path) -> subprocess.Popen[bytes]:
    """Another process that has one."""
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-c", HOLD]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_one_that_is_closed_leaves_nothing(folder: Path) -> None:
    one = Meeting()
    file = Path(one.method.removeprefix("file://"))
    file.write_text("ranks")
    segment = folder / f"{file.name}-tp-cpushm_0"
    segment.touch()
    one.unlink_segments()
    assert not segment.exists()
    for _ in range(2):
        one.close()
        assert not names(folder)


def test_what_a_killed_process_left_goes_with_the_next_one(folder: Path) -> None:
    with held(folder) as process:
        (left,) = names(folder)
        (folder / f"{left}-tp-cpushm_1").touch()
        (folder / "crossdock-ranks-file").touch()
        first = Meeting()
        assert left in names(folder), "its process is alive"
        process.kill()
    second = Meeting()
    here = {Path(each.method).name for each in (first, second)}
    assert names(folder) == here | {"crossdock-ranks-file"}
    first.close()
    second.close()


def test_another_users_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(folder) as process:
        process.kill()
    (left,) = names(folder)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    Meeting().close()
    assert names(folder) == {left}
