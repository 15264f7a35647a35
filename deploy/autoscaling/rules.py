"""What autoscaled pools must be together, and what the autoscaler is told of a spec. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crossdock.deploy.autoscaling.observation import Config, Pool
from crossdock.proto.errors import ConfigError
from crossdock.proto.types import Role

if TYPE_CHECKING:
    from crossdock.deploy.spec import ClusterSpec, PoolSpec


def check_autoscale(spec: ClusterSpec) -> None:
    """Bounds that hold `replicas`, one autoscaled pool of each role and model, and a bound on GPUs
    that the fewest workers fit under. Raises ConfigError."""
    for name, pool in spec.pools.items():
        _check_bounds(f"pools.{name}", pool)
    for pools in spec.pools_by_model.values():
        _check_roles(pools)
    allowed = spec.autoscale.gpus
    autoscaled = {name: pool for name, pool in spec.pools.items() if pool.autoscale}
    least = sum(gpus_of(pool) * pool.autoscale.min for pool in autoscaled.values())
    if allowed and least > allowed:
        message = f"{allowed:g} is not allowed; the pools' autoscale.min need {least:g} already"
        raise ConfigError("autoscale.gpus", message)
    first = sum(gpus_of(pool) * pool.replicas for pool in autoscaled.values())
    if allowed and first > allowed:
        message = f"{allowed:g} is not allowed; the pools' replicas, with which they start, need"
        raise ConfigError("autoscale.gpus", f"{message} {first:g}")


def _check_bounds(path: str, pool: PoolSpec) -> None:
    bounds, replicas = pool.autoscale, pool.replicas
    if not bounds:
        if bounds.min != 1:
            raise ConfigError(f"{path}.autoscale.max", f"is missing beside min: {bounds.min}")
        return
    if bounds.max < bounds.min:
        limit = f"must be at least min, {bounds.min}"
        raise ConfigError(f"{path}.autoscale.max", f"{bounds.max} is not allowed; {limit}")
    if not bounds.min <= replicas <= bounds.max:
        limit = f"must be from autoscale.min, {bounds.min}, to autoscale.max, {bounds.max}"
        raise ConfigError(f"{path}.replicas", f"{replicas} is not allowed; {limit}")


def _check_roles(pools: dict[str, PoolSpec]) -> None:
    """Of one model."""
    first: dict[str, str] = {}  # role -> autoscaled pool
    roles = {pool.role for pool in pools.values()}
    for name, pool in pools.items():
        if not pool.autoscale:
            continue
        path = f"pools.{name}.autoscale"
        if pool.role in first:
            message = f"pools.{first[pool.role]} is autoscaled and {pool.role} as well"
            raise ConfigError(path, f"{message}; one pool of each role of a model may be")
        first[pool.role] = name
        if Role.COLOCATED in roles and len(roles) > 1:
            message = "the model has colocated workers beside pairs, so none of its pools may be"
            raise ConfigError(path, f"{message}: which load goes where cannot be said beforehand")


def config_of(spec: ClusterSpec) -> Config:
    """The autoscaler's view of a spec."""
    pools = tuple(_pool(name, pool, spec) for name, pool in spec.pools.items())
    return Config(pools, spec.slo, spec.autoscale)


def _pool(name: str, pool: PoolSpec, spec: ClusterSpec) -> Pool:
    bounds = pool.autoscale
    return Pool(
        name=name,
        role=Role(pool.role),
        least=bounds.min if bounds else pool.replicas,
        most=bounds.max if bounds else pool.replicas,
        model=pool.model,
        gpus=gpus_of(pool),
        max_batch=pool.max_batch,
        chunk_tokens=pool.chunk_tokens,
        start_s=bounds.start_s,
        alike=spec.worker_kind(name) if pool.hands_over else "",
    )


def gpus_of(pool: PoolSpec) -> float:
    """What one of its workers counts towards the bound on GPUs."""
    return pool.resources.gpus or 1.0
