"""Seeded histories of the protocol, and proof that the checks bite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from protocol_sim import Simulation

from crossdock.decode.worker import DecodeRole
from crossdock.engine.block_pool import BlockPool
from crossdock.kvtransfer import pull
from crossdock.kvtransfer.offers import Offers
from crossdock.prefill.worker import PrefillRole
from crossdock.worker.job import Job

SEEDS = 300


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_every_history_keeps_the_invariants(first: int) -> None:
    for seed in range(first, first + 50):
        Simulation(seed).run()


def no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pull, "_compare", lambda *_: None)


def reaper_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Offers, "reap", lambda self: [])


def generation_never_raised(patch: pytest.MonkeyPatch) -> None:
    allocate = BlockPool.allocate

    def allocate_silently(self: BlockPool, count: int) -> list[int]:
        before: np.ndarray = self.generations.copy()
        blocks = allocate(self, count)
        self.generations[:] = before
        return blocks

    patch.setattr(BlockPool, "allocate", allocate_silently)


def blocks_reused_before_the_read_is_terminal(patch: pytest.MonkeyPatch) -> None:
    forget = DecodeRole._forget

    def forget_at_once(self: DecodeRole, job: Job) -> None:
        forget(self, job)
        for pull_id, blocks in self._quarantine.items():
            self.state.pool.release(blocks)
            self._quarantine[pull_id] = []

    patch.setattr(DecodeRole, "_forget", forget_at_once)


def offered_but_not_pinned(patch: pytest.MonkeyPatch) -> None:
    offer = PrefillRole._offer

    def offer_and_free(self: PrefillRole, *arguments: object) -> object:
        ticket = offer(self, *arguments)  # type: ignore[arg-type]
        self._offers.release([ticket.ticket_id])
        return ticket

    patch.setattr(PrefillRole, "_offer", offer_and_free)
    no_fence(patch)


@pytest.mark.parametrize(
    "plant",
    [
        no_fence,
        reaper_off,
        generation_never_raised,
        blocks_reused_before_the_read_is_terminal,
        offered_but_not_pinned,
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for seed in range(2000):
        try:
            Simulation(seed).run()
        except AssertionError as error:
            print(f"{plant.__name__}: {error}")
            return
    pytest.fail(f"{plant.__name__}: 2000 seeds passed")
