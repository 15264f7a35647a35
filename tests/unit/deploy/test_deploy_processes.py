"""What is found in /proc, and what Ray's nodes are asked for: without a Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from crossdock.deploy import processes
from crossdock.deploy import up as up_module
from crossdock.deploy.home import crossdock_home
from crossdock.deploy.ray import calls, session
from crossdock.deploy.ray.runtime import placement_problem
from crossdock.deploy.runtime import Placement
from crossdock.deploy.store import ClusterStore
from crossdock.deploy.up import up
from crossdock.proto.errors import ConfigError, ModelError, Unavailable

NODES = [
    {"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0, "node:__internal_head__": 1.0}},
    {"Alive": True, "Labels": {"pool": "a"}, "Resources": {"CPU": 8.0, "GPU": 1.0, "rack": 2.0}},
    {"Alive": True, "Labels": {}, "Resources": {"memory": 2500.5 * (1 << 20)}},
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
        (Placement(memory_mb=2500), ""),
        (Placement(memory_mb=64_000_000), "has 64000000 MB of memory; the most is 2500"),
    ],
)
def test_what_no_node_can_take_is_said(placement, problem):
    found = placement_problem(placement, NODES)
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


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL])
def test_a_process_that_a_signal_ended_is_known_by_its_name(tmp_path, number):
    script = "import os, sys; from crossdock.deploy import processes as p; "
    script += "p.record_crashes(sys.argv[1]); os.kill(os.getpid(), int(sys.argv[2]))"
    ended = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(number.value)])
    assert ended.wait(60) == -number
    assert processes.end_of(ended.pid, str(tmp_path)).startswith(number.name)
    assert processes.end_of(1, str(tmp_path)) == "", "it left nothing here"


def test_a_process_that_ended_itself_is_known_by_what_it_said(tmp_path):
    script = "import sys; from crossdock.deploy import processes as p; "
    script += "from crossdock.proto import ending; p.record_crashes(sys.argv[1]); "
    script += "ending.end('rank 1 ended by SIGKILL')"
    ended = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    assert ended.wait(60) == 1
    assert processes.end_of(ended.pid, str(tmp_path)) == "rank 1 ended by SIGKILL"


def test_home_is_the_variable_or_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSDOCK_HOME", str(tmp_path))
    assert crossdock_home() == tmp_path
    monkeypatch.delenv("CROSSDOCK_HOME")
    assert crossdock_home() == Path.home() / ".cache" / "crossdock"


def test_a_home_that_cannot_be_written_says_what_to_set(monkeypatch):
    monkeypatch.delenv("CROSSDOCK_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(Unavailable, match=r"/dev/null/.* set CROSSDOCK_HOME"):  # noqa: SIM117
        with ClusterStore("test").locked():
            pass


def _unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    return folder


def _no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return folder


def _unknown_gguf(folder):
    writer = gguf.GGUFWriter(folder / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


@pytest.mark.parametrize(
    "spoil, why",
    [
        (_unknown_architecture, "model_type 'mamba' is not supported"),
        (_no_tokenizer, "tokenizer.json is missing"),
        (_unknown_gguf, "general.architecture 'mamba' is not supported"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_before_ray(
    tiny_model, tmp_path, monkeypatch, spoil, why
):
    monkeypatch.setenv("CROSSDOCK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(session, "start_ray", lambda *_: pytest.fail("Ray was started"))
    model = spoil(shutil.copytree(tiny_model, tmp_path / "m"))
    path = tmp_path / "c.yaml"
    doors = 'gateway: {grpc: "127.0.0.1:0", http: "127.0.0.1:0"}\n'
    doors += 'controller: {grpc: "127.0.0.1:0"}\n'
    pools = "pools: {prefill: {role: prefill}, decode: {role: decode}}\n"
    path.write_text(f"metadata: {{name: refused}}\nmodel:\n  id: {model}\n{doors}{pools}")
    with pytest.raises(ModelError, match=rf"c\.yaml:3: model\.id: .*{why}"):
        up(path, echo=lambda line: None)


def test_only_an_end_that_ray_cannot_explain_is_put_down_to_a_signal(tmp_path, monkeypatch):
    monkeypatch.setenv(calls.CRASHES, str(tmp_path))
    (tmp_path / "7.crash").write_text("Fatal Python error: Bus error\n\nCurrent thread 0x1")
    death = "pid: 7 ip: 1.2.3.4 The actor is dead. Worker exit type: {} Worker exit detail: {}."
    eof = "Worker unexpectedly exits with a connection error code 2. End of file"
    assert calls._end_of(death.format("SYSTEM_ERROR", eof)) == "its process died (SIGBUS)"
    killed = death.format("INTENDED_SYSTEM_EXIT", "ray.kill was called")
    assert calls._end_of(killed).endswith("(INTENDED_SYSTEM_EXIT: ray.kill was called)")
    elsewhere = death.replace("pid: 7", "pid: 8").format("SYSTEM_ERROR", eof)
    assert "connection error code 2" in calls._end_of(elsewhere)


def test_a_ray_of_our_own_listens_on_the_loopback_and_asks_for_a_token_of_its_own(
    monkeypatch, tmp_path
):
    """What Ray is told when it starts, and that this process is as before when it has ended."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before, told = dict(os.environ), {}

    def init(**settings: object) -> None:
        told.update(settings, environment=dict(os.environ), alone=not can_have_nodes())
        raise OSError(28, "No space left on device")

    def can_have_nodes() -> bool:
        return session.ray_constants.ENABLE_RAY_CLUSTER

    monkeypatch.setattr(session.ray, "init", init)
    with pytest.raises(Unavailable, match="No space left"):
        session.start_ray("", 80, str(tmp_path))
    assert told["address"] == "local" and told["_node_ip_address"] == "127.0.0.1"
    assert told["alone"], "or Ray would look for another address"
    assert Path(told["_temp_dir"]).parent == tmp_path
    assert "RAY_AUTH_TOKEN" not in told["environment"]
    assert told["environment"]["RAY_AUTH_MODE"] == "token"
    token = Path(told["environment"]["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    session.stop_ray()
    assert dict(os.environ) == before and can_have_nodes()


def test_a_ray_that_is_joined_is_left_as_it_is(monkeypatch):
    before, told = dict(os.environ), {}
    monkeypatch.setattr(session.ray, "init", lambda **settings: told.update(settings))
    session.start_ray("10.0.0.1:6379", 80, "")
    assert told["address"] == "10.0.0.1:6379" and "_node_ip_address" not in told
    assert dict(os.environ) == before


KEY, TLS = "asks nobody for a key", "without gateway.tls"


@pytest.mark.parametrize(
    "door, tls, auth, warned",
    [
        ("0.0.0.0:0", "", "", [KEY, TLS]),
        ("192.0.2.7:0", "", "", [KEY, TLS]),
        ("127.0.0.1:0", "", "", []),
        ("0.0.0.0:0", "", "auth: {keys: keys.json}\n", [TLS]),
        ("0.0.0.0:0", ", tls: {cert: c.pem, key: k.pem}", "auth: {keys: keys.json}\n", []),
        ("0.0.0.0:0", ", tls: {cert: c.pem, key: k.pem}", "", [KEY]),
    ],
)
def test_up_warns_of_what_a_door_lacks_that_other_hosts_reach(tmp_path, door, tls, auth, warned):
    path = tmp_path / "c.yaml"
    said = []
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that nothing is started
        port = taken.getsockname()[1]
        path.write_text(
            "metadata: {name: doors}\nmodel: {id: simulated}\n"
            f'gateway: {{grpc: "127.0.0.1:0", http: "{door}"{tls}}}\n{auth}'
            f'controller: {{grpc: "127.0.0.1:{port}"}}\n'
            "pools: {all: {role: colocated, engine: {kind: simulated}}}\n"
        )
        with pytest.raises(ConfigError, match="cannot listen"):
            up(path, echo=said.append)
    warnings = [line for line in said if "warning" in line]
    assert len(warnings) == len(warned)
    for line, words in zip(warnings, warned, strict=True):
        assert "c.yaml:3: gateway.http: " in line and words in line


def test_a_token_that_others_can_read_is_named(monkeypatch, tmp_path):
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert session.open_token() == "", "there is none"
    token.write_text("secret")
    for mode, found in ((0o600, ""), (0o644, str(token)), (0o640, str(token))):
        token.chmod(mode)
        assert session.open_token() == found


def test_all_files_of_a_local_ray_are_below_a_folder_of_this_user_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))
    folder = Path(up_module._temp_folder())
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        deepest = folder / "ray" / "session_2026-11-22_00-59-31_859207_1234567" / "sockets"
        assert len(str(deepest / "plasma_store")) <= 107, "a Unix socket's path"
    finally:
        folder.rmdir()
