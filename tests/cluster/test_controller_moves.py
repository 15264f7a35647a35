"""The controller's node dies, and with it the disk: another controller goes on elsewhere."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from ray_kit import ask, until, write_spec

from crossdock.deploy import admin
from crossdock.deploy.ray.mirror import GcsMirror
from crossdock.deploy.store import ClusterStore
from crossdock.deploy.up import Cluster
from crossdock.proto.errors import CrossdockError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def nodes(monkeypatch):
    """The head has all but the controller, which may run on either of two more. Ray takes a node
    for lost after 3 s, not 30."""
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "1000")
    from ray.cluster_utils import Cluster as RayCluster  # after Crossdock's settings for it

    nodes = RayCluster()
    small = {"num_cpus": 2, "object_store_memory": 80 << 20}
    nodes.add_node(**small | {"num_cpus": 4}, include_dashboard=False, labels={"pool": "work"})
    for _ in range(2):
        nodes.add_node(**small, labels={"control": "here"})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def controllers_node() -> str:
    """The id of the node that the living controller runs on; empty while there is none."""
    import ray

    actors = ray._private.state.actors().values()
    alive = [actor for actor in actors if actor["State"] == "ALIVE"]
    found = [a["Address"]["NodeID"] for a in alive if a["ActorClassName"] == "ControllerActor"]
    return found[0] if found else ""


def test_a_controller_on_another_node_has_key_spec_and_workers(nodes, tmp_path, tiny_model):
    path = write_spec(
        tmp_path / "c.yaml", tiny_model, on_p="pool: work", on_d="pool: work", name="-moves"
    )
    text = path.read_text()
    path.write_text(
        text.replace("controller: {", "controller: {nodes: {labels: {control: here}}, ")
    )
    cluster = Cluster(path, nodes.address)
    try:
        cluster.start(120)
        assert admin.scale("decode", 2, cluster.admin, timeout_s=60).converged
        name, first = cluster.spec.metadata.name, controllers_node()
        before, kept = admin.status(cluster.admin), read(GcsMirror(name).load())
        assert before.generation == kept["generation"] == 2
        shutil.rmtree(ClusterStore(name).folder)
        [lost] = [node for node in nodes.list_all_nodes() if node.node_id == first]
        nodes.remove_node(lost, allow_graceful=False)
        until(lambda: controllers_node() not in ("", first), 90, "the controller is elsewhere")
        after = until(lambda: status_of(cluster), 60, "the controller answers")
        assert after.generation == 2 and after.converged
        assert {w.name: w.pid for w in after.workers} == {w.name: w.pid for w in before.workers}
        assert sum(d.action.startswith("adopt") for d in after.decisions) == 4
        assert secrets_of(GcsMirror(name).load()) == kept["secrets"]
        assert ClusterStore(name).generation() == 2, "its own disk has it as well"
        assert len(ask(cluster).token_ids) == 8
        assert admin.scale("decode", 1, cluster.admin, timeout_s=60).converged
        assert admin.status(cluster.admin).generation == 3
    finally:
        cluster.stop()
    assert not ClusterStore(name).folder.exists()


def status_of(cluster: Cluster) -> Any:
    try:
        status = admin.status(cluster.admin)
    except CrossdockError:
        return None
    return status if status.converged else None


def read(document: bytes) -> dict[str, Any]:
    return json.loads(document)


def secrets_of(document: bytes) -> dict[str, str]:
    return read(document)["secrets"]
