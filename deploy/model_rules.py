"""What models, routes and pools of the YAML must be together. Pure; raises ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crossdock.model.store import SIMULATED
from crossdock.proto.errors import ConfigError
from crossdock.proto.types import Role
from crossdock.router.serving import Rule, check_name

if TYPE_CHECKING:
    from crossdock.deploy.spec import ClusterSpec, PoolSpec


def check_models(spec: ClusterSpec) -> None:
    """One model or several, names that tell them apart, pools that name theirs, and routes that
    lead to them."""
    if spec.models and spec.model.id:
        raise ConfigError("models", "there is model as well; one model, or models by name")
    if not spec.models and not spec.model.id.strip():
        raise ConfigError("model.id", "must not be empty; a model, or several by name in models")
    _check_names(spec)
    for name, pool in spec.pools.items():
        _check_model(f"pools.{name}.model", pool.model, spec)
    for name, rules in spec.routes.items():
        _check_route(f"routes.{name}", rules, spec)


def _check_names(spec: ClusterSpec) -> None:
    taken = dict.fromkeys(spec.models, "a model")
    for name, model in spec.models.items():
        check_name(f"models.{name}", name)
        for number, alias in enumerate(model.aliases):
            path = f"models.{name}.aliases[{number}]"
            check_name(path, alias)
            if alias in taken:
                raise ConfigError(path, f"{alias!r} is {taken[alias]} already")
            taken[alias] = f"an alias of {name!r}"
    for name in spec.prices if spec.models else ():
        if name not in spec.models:
            what = f"is {taken[name]}" if name in taken else "is not among models"
            raise ConfigError(f"prices.{name}", f"{name!r} {what}; one of {', '.join(spec.models)}")
    for name in spec.routes:
        check_name(f"routes.{name}", name)
        if taken.get(name, "a model") != "a model":
            raise ConfigError(f"routes.{name}", f"{name!r} is {taken[name]} already")


def _check_model(path: str, name: str, spec: ClusterSpec) -> None:
    """Whether a pool's model is one of `models`."""
    known = ", ".join(spec.models)
    if spec.models and not name:
        raise ConfigError(path, f"is missing; one of {known}")
    if spec.models and name not in spec.models:
        raise ConfigError(path, f"{name!r} is not among models; one of {known}")
    if name and not spec.models:
        raise ConfigError(path, f"{name!r} is not allowed; the cluster has one model and no models")


def _check_route(path: str, rules: tuple[Rule, ...], spec: ClusterSpec) -> None:
    if not spec.models:
        raise ConfigError(path, "is not allowed; the cluster has one model and no models")
    if not rules:
        raise ConfigError(path, "must have at least one rule")
    for number, rule in enumerate(rules):
        at, last = f"{path}[{number}]", number == len(rules) - 1
        named = {f"{at}.use": rule.use}
        named |= {f"{at}.fallback[{i}]": model for i, model in enumerate(rule.fallback)}
        for where, model in named.items():
            if model not in spec.models:
                known = ", ".join(spec.models)
                raise ConfigError(where, f"{model!r} is not among models; one of {known}")
            if list(named.values()).count(model) > 1:
                raise ConfigError(where, f"{model!r} is there twice")
        tokens = rule.when.prompt_tokens
        if tokens.below and tokens.below <= tokens.above + 1:
            limit = f"no length is above {tokens.above} and below it"
            raise ConfigError(f"{at}.when.prompt_tokens.below", f"{tokens.below}: {limit}")
        if last and rule.when:
            raise ConfigError(f"{at}.when", "the last rule is for all others and has no conditions")
        if not last and not rule.when:
            raise ConfigError(at, "always holds, so no rule after it is ever used")


def check_pools(spec: ClusterSpec) -> None:
    """Whether every model could be served."""
    for model, pools in spec.pools_by_model.items():
        workers = {role.value: 0 for role in Role}
        for pool in pools.values():
            workers[pool.role] += pool.replicas
        whole = workers[Role.PREFILL] and workers[Role.DECODE]
        if not whole and not workers[Role.COLOCATED]:
            counts = ", ".join(f"{count} {role}" for role, count in workers.items())
            what = f"{model!r} could not be served" if model else "nothing could be served"
            message = f"{what}: at least 1 prefill and 1 decode worker, or 1 colocated"
            raise ConfigError("pools", f"{message}, must be there ({counts})")


def check_engines(spec: ClusterSpec) -> None:
    """KV goes from every prefill pool of a model to every decode pool of it, so both have one kind
    of engine."""
    for pools in spec.pools_by_model.values():
        first: dict[str, str] = {}  # kind -> pool
        for name, pool in pools.items():
            kind, path = pool.engine.kind, f"pools.{name}.engine.kind"
            if pool.hands_over:
                first.setdefault(kind, name)
            if len(first) > 1:
                other, of_other = next(iter(first.items()))
                message = f"{kind!r} cannot hand KV to or from {other!r} of pools.{of_other}"
                raise ConfigError(path, message)
            pool.engine.check_kv_dtype(spec.kv.dtype)
            if spec.model_of(name).id == SIMULATED != kind:
                raise ConfigError(
                    path, f"{kind!r} needs a model; model.id simulated has no weights"
                )


def check_ranks(spec: ClusterSpec) -> None:
    """A rank reads its peer's, so pools that hand KV to each other have workers of as many, of a
    model that is the same."""
    for pools in spec.pools_by_model.values():
        first = next(((name, pool) for name, pool in pools.items() if pool.hands_over), None)
        for name, pool in pools.items():
            ranks, path = pool.engine.ranks, f"pools.{name}.engine.args.tensor_parallel_size"
            if first and pool.hands_over and ranks != (there := first[1].engine.ranks):
                message = f"{ranks} cannot hand KV to or from {there} of pools.{first[0]}"
                raise ConfigError(path, message)
            if first and pool.hands_over:
                _check_same_kv(f"pools.{name}", pool.engine.kv_args, first)
            if ranks > 1 and 0 < pool.resources.gpus < ranks:
                found = f"{ranks} is not allowed with {pool.resources.gpus:g} GPUs"
                raise ConfigError(path, f"{found}; each rank has one: pools.{name}.resources.gpus")
            if ranks > 1 and spec.kv.verify == "checksum":
                message = f"'checksum' sums the memory of one rank; pools.{name} has {ranks}"
                raise ConfigError("kv.verify", message)


def _check_same_kv(path: str, args: Mapping[str, Any], first: tuple[str, PoolSpec]) -> None:
    other, pool = first
    for arg, given in args.items():
        if given != (there := pool.engine.kv_args[arg]):
            message = f"KV would mean something else than to pools.{other}"
            raise ConfigError(f"{path}.engine.args.{arg}", f"{given!r} is not {there!r}: {message}")


def check_gpus(spec: ClusterSpec) -> None:
    """NCCL moves GPU memory only, and never between two workers on one GPU."""
    for name, pool in spec.pools.items():
        if spec.kv.transport == "nccl" and pool.resources.gpus < 1:
            found = f"{pool.resources.gpus:g} is not allowed"
            raise ConfigError(
                f"pools.{name}.resources.gpus", f"{found}; kv.transport nccl needs at least 1"
            )
