"""A reader and an owner joined by the nccl transport."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nccl_kit import Worker


@pytest.fixture
def pair() -> Iterator[tuple[Worker, Worker]]:
    reader, owner = Worker(), Worker(seed=3)
    reader.meet(owner)
    reader.transport.warm(owner.incarnation)
    yield reader, owner
    for worker in (reader, owner):
        worker.nccl.stuck = worker.nccl.noisy = False
        worker.pool.close()
