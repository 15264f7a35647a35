"""A controller that has converged over fake processes, and what it stands on."""

from __future__ import annotations

import pytest
from controller_kit import YAML, FakeCluster, running

from crossdock.deploy import credentials
from crossdock.deploy.admin_service import serve_admin
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore


@pytest.fixture
async def cluster():
    return FakeCluster()


@pytest.fixture
def store(tmp_path):
    store = ClusterStore("test", tmp_path)
    store.begin(ClusterSpec.parse(YAML).to_yaml(), "life")
    return store


@pytest.fixture
async def controller(cluster, store):
    async with running(cluster, store) as controller:
        assert await controller.wait_converged(5)
        yield controller


@pytest.fixture
async def address(controller, store, tmp_path, monkeypatch):
    """Where the controller takes Admin calls, whose credential is found in CROSSDOCK_HOME."""
    monkeypatch.setenv("CROSSDOCK_HOME", str(tmp_path))
    server, address = await serve_admin(controller, "127.0.0.1:0")
    store.save(credentials.FILE, credentials.write(controller.authority, address))
    yield address
    await server.stop(0)
