"""Whole clusters on a real Ray: real workers and gateways, NIXL, a tiny model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from freeze import freeze
from ray_kit import (
    PROMPT,
    UP,
    Load,
    answers_after,
    ask,
    is_controller,
    serving,
    temp_folders,
    until,
    worker_of,
    write_spec,
)

from crossdock.client import Client
from crossdock.deploy import admin, credentials, processes
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.up import Cluster, up
from crossdock.proto.channels import open_blocking_channel
from crossdock.proto.errors import ConfigError, ModelError, Unavailable
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory, tiny_model) -> Path:
    return write_spec(tmp_path_factory.mktemp("cluster") / "cluster.yaml", tiny_model)


@pytest.fixture(scope="module")
def cluster(spec_path):
    with serving(spec_path, timeout_s=120) as cluster:
        yield cluster


@pytest.fixture
def own_spec(tmp_path, tiny_model) -> Path:
    return write_spec(tmp_path / "own.yaml", tiny_model, name="-own")


def test_a_request_is_served_by_two_processes(cluster):
    result = ask(cluster)
    assert len(result.token_ids) == 8
    status = admin.status(cluster.admin, check_integrity=True)
    assert status.converged
    pids = {w.pid for w in status.workers} | {g.pid for g in status.gateways} | {os.getpid()}
    assert len(pids) == 4
    blocks = -(-(len(PROMPT) + 1) // 16)
    decode = next(w.worker for w in status.workers if w.pool == "decode")
    assert decode.transferred_blocks >= blocks
    assert decode.recomputed_tokens == 0
    assert not any(w.worker.integrity_error for w in status.workers)
    assert not any(w.worker.leases for w in status.workers)


def test_processes_of_our_own_ray_are_as_nice_as_who_started_them(cluster):
    status = cluster.status()
    pids = [member.pid for member in (*status.workers, *status.gateways)]
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [ours] * 3


def test_pools_grow_and_shrink_under_load_without_a_failed_request(
    cluster, spec_path, tiny_model, tmp_path
):
    two = write_spec(tmp_path / "two.yaml", tiny_model, prefill=2, decode=2)
    with Load(cluster.grpc) as load:
        load.more(8)
        reply = admin.apply(two, cluster.admin, timeout_s=120)
        assert reply.converged and len(reply.actions) == 2
        assert len(admin.status(cluster.admin).workers) == 4
        until(lambda: all_at_work(cluster), 60, "every worker gets something to do")
        reply = admin.apply(spec_path, cluster.admin, timeout_s=120)
        assert reply.converged and all(a.startswith("drain") for a in reply.actions)
        load.more(8)
    assert not load.errors, load.errors[:3]
    assert len(admin.status(cluster.admin).workers) == 2


def test_a_changed_setting_replaces_every_worker_under_load_without_a_failed_request(
    cluster, spec_path, tmp_path
):
    before = {w.pid for w in admin.status(cluster.admin).workers}
    changed = tmp_path / "changed.yaml"
    changed.write_text(spec_path.read_text().replace("kv_memory_mb: 8", "kv_memory_mb: 12"))
    with Load(cluster.grpc) as load:
        load.more(4)
        assert admin.apply(changed, cluster.admin, timeout_s=120).converged
        load.more(4)
    assert not load.errors, load.errors[:3]
    after = admin.status(cluster.admin).workers
    assert len(after) == 2 and not before & {w.pid for w in after}
    assert admin.apply(changed, cluster.admin, dry_run=True).actions == []


def all_at_work(cluster: Cluster) -> bool:
    workers = admin.status(cluster.admin).workers
    return all(w.worker.generated_tokens for w in workers) and len(workers) == 4


@pytest.mark.parametrize("pool, number", [("decode", signal.SIGKILL), ("prefill", signal.SIGSEGV)])
def test_a_killed_worker_is_replaced_and_clients_can_try_again(cluster, pool, number):
    victim = worker_of(cluster, pool)
    incarnation = victim.worker.description.incarnation
    with Load(cluster.grpc) as load:
        load.more(4)
        os.kill(victim.pid, number)
        killed = time.monotonic()
        until(lambda: served_again(cluster), 20, "a request succeeds")
        recovery_s = time.monotonic() - killed
        load.more(4)
    assert recovery_s < 20
    assert all(isinstance(error, Unavailable) for error in load.errors), load.errors
    until(lambda: admin.status(cluster.admin).converged, 20, "the cluster is whole")
    successor = worker_of(cluster, pool)
    assert successor.name == victim.name and successor.restarts >= 1
    assert successor.worker.description.incarnation != incarnation
    status = admin.status(cluster.admin, check_integrity=True)
    assert not any(w.worker.integrity_error for w in status.workers)
    [why] = [d.reason for d in status.decisions if "lost" in d.reason and victim.name in d.action]
    assert number.name in why


def served_again(cluster: Cluster) -> bool:
    try:
        return len(ask(cluster, salt=1).token_ids) == 8
    except Unavailable:
        return False


def test_a_killed_controller_comes_back_and_disturbs_nobody(cluster):
    workers = admin.status(cluster.admin).workers
    before = {w.name: w.pid for w in workers}
    [controller] = [p.pid for p in processes.descendants(os.getpid()) if is_controller(p.pid)]
    prefill, decode = worker_of(cluster, "prefill"), worker_of(cluster, "decode")
    with Load(cluster.grpc) as load, Client(cluster.grpc) as client:
        load.more(2)
        freeze(decode.pid)
        stream = client.stream([9, *PROMPT], max_tokens=8, temperature=0, ignore_eos=True)
        assert len(next(stream).token_ids) == 1
        assert status_of(cluster, prefill).leases  # open while nobody controls
        os.kill(controller, signal.SIGKILL)
        os.kill(decode.pid, signal.SIGCONT)
        assert sum(len(chunk.token_ids) for chunk in stream) == 7
        until(lambda: answers_after(cluster, controller), 30, "the controller answers")
        load.more(4)
    assert not load.errors
    until(lambda: not any(held(cluster, worker) for worker in workers), 5, "nothing is held")
    status = cluster.status()
    assert {w.name: w.pid for w in status.workers} == before
    assert any(d.action.startswith("adopt") for d in status.decisions)


def status_of(cluster: Cluster, worker) -> worker_pb2.WorkerStatus:
    """From the worker itself."""
    there, operator = worker.worker.description, credentials.find(cluster.admin)
    with open_blocking_channel(there.address, operator, there.incarnation.hex()) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        return stub.GetStatus(worker_pb2.GetStatusRequest(check_integrity=True), timeout=20)


def held(cluster: Cluster, worker) -> int:
    status = status_of(cluster, worker)
    assert not status.integrity_error
    return status.used_blocks + len(status.leases)


def test_one_name_is_served_once(cluster, spec_path):
    with pytest.raises(ConfigError, match=r"cluster\.yaml:2: metadata\.name: .*another"):
        up(spec_path)


def test_what_cannot_change_is_refused_with_its_line(cluster, own_spec):
    with pytest.raises(ConfigError, match=r"own\.yaml:2: metadata\.name: cannot change"):
        admin.apply(own_spec, cluster.admin)
    with pytest.raises(ConfigError, match="pool: 'encode' is unknown; the pools are"):
        admin.scale("encode", 1, cluster.admin)
    assert admin.status(cluster.admin).converged


def test_a_gateway_change_is_tried_and_refused_while_the_old_one_serves(
    cluster, spec_path, tmp_path
):
    changed = tmp_path / "gateway.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = spec_path.read_text()
        changed.write_text(text.replace('http: "127.0.0.1:0"', f'http: "127.0.0.1:{port}"'))
        with pytest.raises(ConfigError, match=rf"gateway\.yaml:4: gateway: .*{port} is in use"):
            admin.apply(changed, cluster.admin)
    assert admin.status(cluster.admin).converged
    assert len(ask(cluster).token_ids) == 8
    changed.write_text(text.replace("  drain_s: 2", "  drain_s: 2\n  limits: {max_body_mb: 300}"))
    assert admin.apply(changed, cluster.admin, timeout_s=60).converged
    [gateway] = admin.status(cluster.admin).gateways
    assert gateway.grpc != cluster.grpc, "the old one served until the new one did"
    cluster.grpc = gateway.grpc
    assert len(ask(cluster).token_ids) == 8


def test_what_rays_core_refuses_is_refused_in_the_file(cluster, spec_path):
    """Names of resources and parts of GPUs, which Ray checks only when an actor is made."""
    import ray

    class Idle:
        pass

    def ray_takes(**options) -> bool:
        try:
            ray.kill(ray.remote(Idle).options(num_cpus=0, **options).remote())
        except (ValueError, UnicodeEncodeError):
            return False
        return True

    def file_takes(resources: str) -> bool:
        with contextlib.suppress(ConfigError):
            text = spec_path.read_text()
            at = "    kv_memory_mb: 8\n"
            ClusterSpec.parse(text.replace(at, f"{at}    resources: {resources}\n", 1))
            return True
        return False

    for gpus in (0.5, 1.0, 1.5, 2.0):
        assert ray_takes(num_gpus=gpus) == file_takes(f"{{gpus: {gpus}}}"), gpus
    names = ("CPU", "GPU", "memory", "object_store_memory", "bundle", "rack", "a b", "node:n", "ü")
    accelerators = ("TPU", "HPU", "NPU", "neuron_cores", "RBLN", "FURIOSA", "MBLT", "TTNPU")
    for name, amount in itertools.product((*names, *accelerators), (0.5, 1.0, 3.0)):
        given = f'{{custom: {{"{name}": {amount}}}}}'
        assert ray_takes(resources={name: amount}) == file_takes(given), (name, amount)


# -- in a process of its own ------------------------------------------------------------------


@contextlib.contextmanager
def started(path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", UP, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_says_ready_once_and_leaves_nothing_behind(own_spec, number):
    shm_before = set(os.listdir("/dev/shm"))
    with started(own_spec) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("READY"):
                break
        assert lines and lines[-1].startswith("READY grpc=127.0.0.1:"), "".join(lines)
        ours = processes.descendants(process.pid)
        folders = {part for p in ours for part in temp_folders(p.pid)}
        assert len(ours) >= 5 and folders
        # As a terminal does it: Ctrl-C reaches every process of the group.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        rest = process.stdout.read()
        assert process.wait(30) == 0, rest
    assert not [p for p in ours if processes.alive(p)]
    assert not [folder for folder in folders if Path(folder).exists()]
    mine = {str(p.pid) for p in ours}
    left = {
        name for name in set(os.listdir("/dev/shm")) - shm_before if mine & set(name.split("-"))
    }
    assert not left
    assert "READY" not in rest and "curl http://127.0.0.1:" in rest


def test_up_names_the_tensor_that_a_model_lacks(own_spec, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "broken")
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] += 1  # whose weights are not there
    (model / "config.json").write_text(json.dumps(config))
    write_spec(own_spec, model, name="-own")
    with started(own_spec) as process:
        output = process.stdout.read()
        assert process.wait(60) != 0
    assert re.search(r"own\.yaml:3: model\.id: .*broken: tensor model\.layers", output), output
    assert "READY" not in output


def test_a_truncated_model_is_found_before_anything_starts(own_spec, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "short")
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    write_spec(own_spec, model, name="-own")
    with pytest.raises(ModelError, match=r"own\.yaml:3: model\.id: .*model\.safetensors"):
        up(own_spec, echo=lambda line: pytest.fail(f"started: {line}"))


def test_up_names_the_field_of_a_port_in_use(own_spec):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = own_spec.read_text().replace('http: "127.0.0.1:0"', f'http: "127.0.0.1:{port}"')
        own_spec.write_text(text)
        with started(own_spec) as process:
            output = process.stdout.read()
            assert process.wait(30) != 0
    assert f"own.yaml:6: gateway.http: cannot listen on 127.0.0.1:{port}" in output


# -- on three nodes ---------------------------------------------------------------------------


@pytest.fixture
def three_nodes(cluster):
    """A Ray cluster of three nodes; the one-node cluster of the tests above has ended by then."""
    cluster.stop()
    from ray.cluster_utils import Cluster as RayCluster

    nodes = RayCluster()
    small = {"num_cpus": 2, "object_store_memory": 80 << 20}
    nodes.add_node(**small, include_dashboard=False)
    nodes.add_node(**small, labels={"pool": "inbound"})
    nodes.add_node(**small, labels={"pool": "outbound"})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def test_pools_run_on_the_nodes_that_the_yaml_names(three_nodes, tmp_path, tiny_model):
    path = write_spec(
        tmp_path / "nodes.yaml", tiny_model, on_p="pool: inbound", on_d="pool: outbound"
    )
    cluster = Cluster(path, three_nodes.address)
    try:
        cluster.start(120)
        assert len(ask(cluster).token_ids) == 8
        import ray

        label_of = {node["NodeID"]: node["Labels"].get("pool") for node in ray.nodes()}
        status = admin.status(cluster.admin)
        placed = {w.pool: label_of[w.node_id] for w in status.workers}
        assert placed == {"prefill": "inbound", "decode": "outbound"}
        assert len({w.node_id for w in status.workers}) == 2
    finally:
        cluster.stop()
