"""A controller that has converged over fake processes, and what it stands on."""

from __future__ import annotations

import pytest
from controller_kit import YAML, FakeCluster, running

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
