"""A worker's view of the other workers: whom it may pull from, and what to ask them of tickets.

    unknown ──ensure──> being met ──> known ──> left the membership: unknown
                            └──failed: unknown, and the next who asks tries again

Nothing here waits or sends: `PeerCalls` does, and answers by callback.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from crossdock.proto.errors import TransferFailed
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb

log = logging.getLogger(__name__)

Met = pb.WorkerDescription | TransferFailed
Renewed = pb.RenewLeasesResponse | TransferFailed


class PeerCalls(Protocol):
    """Calls to other workers. Each is answered once; TransferFailed says why it was not."""

    def introduce(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        """Makes the blocks of that incarnation, if it lives at the address, readable."""

    def forget(self, incarnation: bytes) -> None:
        """Undoes an introduction, or ends one under way, which is not answered then."""

    def renew(
        self, address: str, ids: list[bytes], lease_s: float, done: Callable[[Renewed], None]
    ) -> None: ...

    def release(self, address: str, ids: list[bytes]) -> None:
        """Best effort: a ticket that cannot be released ends with its lease."""


@dataclass(eq=False)
class Peers:
    """Keyed by incarnation: a restarted worker on the same address is another peer."""

    calls: PeerCalls
    clock: Callable[[], float]
    _known: dict[bytes, pb.WorkerDescription] = field(default_factory=dict)
    # Who waits for each that is being met.
    _meetings: dict[bytes, list[Callable[[Met], None]]] = field(default_factory=dict)

    def update(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """The prefill workers among `endpoints` become the peers; a bad one is left out."""
        wanted = {bytes.fromhex(e.incarnation): e for e in endpoints if e.role is Role.PREFILL}
        for incarnation in [*self._known, *self._meetings]:
            if incarnation not in wanted:
                self._drop(incarnation)
        for incarnation, endpoint in wanted.items():
            self.ensure(incarnation, endpoint.address, partial(_warn, endpoint.name))

    def ensure(self, incarnation: bytes, address: str, then: Callable[[Met], None]) -> None:
        """Calls `then` once blocks can be read from this peer, maybe at once, or with why not."""
        if incarnation in self._known:
            then(self._known[incarnation])
        elif incarnation in self._meetings:
            self._meetings[incarnation].append(then)
        else:
            self._meetings[incarnation] = waiting = [then]
            self.calls.introduce(incarnation, address, partial(self._met, incarnation, waiting))

    def renew(
        self,
        tickets: Iterable[tuple[str, bytes]],
        lease_s: float,
        answered: Callable[[set[bytes], set[bytes], float], None],
    ) -> None:
        """Extends leases, one call a peer. `answered` gets the ids renewed, the ids lost, and until
        when the former are good, on the clock: from now, which is never later than was granted.
        It is not called for a peer that does not answer: those leases run on."""
        until = self.clock() + lease_s

        def done(ids: list[bytes], answer: Renewed) -> None:
            if isinstance(answer, TransferFailed):
                log.warning("leases were not renewed: %s", answer)
                return
            lost = set(answer.unknown_ticket_ids)
            answered(set(ids) - lost, lost, until)

        for address, ids in _by_address(tickets):
            self.calls.renew(address, ids, lease_s, partial(done, ids))

    def release(self, tickets: Iterable[tuple[str, bytes]]) -> None:
        """One call a peer."""
        for address, ids in _by_address(tickets):
            self.calls.release(address, ids)

    def _met(self, incarnation: bytes, waiting: list[Callable[[Met], None]], met: Met) -> None:
        if self._meetings.get(incarnation) is not waiting:
            return  # it left meanwhile, and whoever waited was told
        del self._meetings[incarnation]
        if not isinstance(met, TransferFailed):
            self._known[incarnation] = met
        for then in waiting:
            then(met)

    def _drop(self, incarnation: bytes) -> None:
        self._known.pop(incarnation, None)
        self.calls.forget(incarnation)
        for then in self._meetings.pop(incarnation, ()):
            then(TransferFailed(f"{incarnation.hex()} left the cluster"))


def _warn(name: str, met: Met) -> None:
    if isinstance(met, TransferFailed):
        log.warning("no KV from %s: %s", name, met)


def _by_address(tickets: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, list[bytes]]]:
    groups: dict[str, list[bytes]] = defaultdict(list)
    for address, ticket_id in tickets:
        groups[address].append(ticket_id)
    return groups.items()
