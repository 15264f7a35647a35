"""The spec that the controller follows, its generation, and the last one that was carried out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from operator import attrgetter
from typing import TypeAlias

from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.store import ClusterStore
from crossdock.proto.errors import ConfigError, Overtaken

log = logging.getLogger(__name__)

Change: TypeAlias = Callable[[ClusterSpec], ClusterSpec]

FIXED_FIELDS = (
    *("metadata.name", "model.id", "model.dtype", "kv.dtype", "kv.block_size", "kv.transport"),
    *("controller.grpc", "controller.nodes", "ray.address", "ray.object_store_mb"),
)


class AppliedSpec:
    """Written to the store before it is followed, so that a restarted controller goes on with it.

    `good` is the last spec that was carried out in full. It is read in place of one on disk that
    can't be (another version wrote it), and gone back to when a change turns out not to work.
    """

    def __init__(self, store: ClusterStore) -> None:
        """Raises ConfigError where neither the spec nor the last good one can be read."""
        self._store = store
        self.generation = store.generation()
        self.changed_by = "crossdock up"  # who made this generation, or why
        self.good: ClusterSpec | None = None
        with contextlib.suppress(ConfigError):
            self.good = ClusterSpec.parse(store.good_spec())
        try:
            self.spec = ClusterSpec.parse(store.spec(), "the spec of last time")
        except ConfigError as error:
            if self.good is None:
                raise
            self.spec, self.changed_by = self.good, f"going back, as {error}"
            log.warning("followed again is the last spec that was carried out: %s", error)

    def follow(self, spec: ClusterSpec, by: str) -> None:
        """The next generation, unless it is the same."""
        if spec != self.spec:
            self._store.save_spec(spec.to_yaml(), self.generation + 1)
            self.spec, self.changed_by, self.generation = spec, by, self.generation + 1

    def carried_out(self) -> None:
        """The cluster is as specified."""
        if self.good != self.spec:
            self._store.save_good(self.spec.to_yaml())
            self.good = self.spec

    def check_generation(self, generation: int) -> None:
        """Raises Overtaken unless it is the present one."""
        if generation != self.generation:
            now = f"generation {self.generation}, made by {self.changed_by}"
            raise Overtaken(f"the spec is no longer of generation {generation} but of {now}")

    def check_change(self, spec: ClusterSpec) -> None:
        """Raises ConfigError for what can't be changed while the cluster runs."""
        fixed = [(path, *map(attrgetter(path), (self.spec, spec))) for path in FIXED_FIELDS]
        # Half-way through, KV would have to go from one kind of engine to the other, or from one
        # number of ranks to another.
        running = [pool for each in (self.spec, self.good) if each for pool in each.pools.values()]
        engines = [(pool.model, pool.engine) for pool in running if pool.hands_over]
        for name, pool in spec.pools.items():
            path, now = f"pools.{name}.engine", pool.engine
            for model, before in engines if pool.hands_over else ():
                if model == pool.model:
                    fixed.append((f"{path}.kind", before.kind, now.kind))
                    fixed.append((f"{path}.args.tensor_parallel_size", before.ranks, now.ranks))
                    for arg, given in now.kv_args.items():
                        fixed.append((f"{path}.args.{arg}", before.kv_args.get(arg), given))
        for name in spec.models.keys() & self.spec.models.keys():
            for about in ("id", "dtype"):
                both = (getattr(each.models[name], about) for each in (self.spec, spec))
                fixed.append((f"models.{name}.{about}", *both))
        for path, before, after in fixed:
            if before != after:
                message = f"cannot change from {before!r} to {after!r} while the cluster runs"
                raise ConfigError(path, f"{message}; use `crossdock down` and `up`")
