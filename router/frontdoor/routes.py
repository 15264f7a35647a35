"""The rules of a route: the first whose conditions hold names the model, and where that is full one
of its fallbacks serves instead."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from crossdock.proto.errors import ContextLengthExceeded, Forbidden
from crossdock.router.frontdoor.frontend import Frontend, Prepared
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.validate import UNLIMITED
from crossdock.router.serving import Rule, When

TOO_LONG = float("inf")


@dataclass(frozen=True)
class Asked:
    """What rules are asked of: who asks, and how. `deadline` is on the gateway's clock."""

    principal: Principal
    headers: Mapping[str, str]
    budget_left: Callable[[], float]  # the part of the credential's budget, 1.0 where it has none
    deadline: float


@dataclass
class Candidate:
    """A model that may be chosen. The request is read for it once, and only where that matters."""

    frontend: Frontend
    prepare: Callable[[Frontend], Awaitable[Prepared]]
    _prepared: Prepared | None = field(default=None)

    async def prepared(self) -> Prepared:
        """The request as this model reads it. Raises InvalidRequest."""
        if self._prepared is None:
            self._prepared = await self.prepare(self.frontend)
        return self._prepared

    async def tokens(self) -> float:
        """Of the longest prompt; infinite where it is longer than this model takes."""
        try:
            longest = (await self.prepared()).longest
        except ContextLengthExceeded:
            return TOO_LONG
        return longest if longest < self.frontend.validator.capacity else TOO_LONG

    async def why_full(self, rule: Rule, asked: Asked) -> str:
        """Why it had better not be this model; empty where it may be."""
        tokens = await self.tokens()
        if tokens == TOO_LONG:
            return "the prompt is too long for it"
        most = (await self.prepared()).sampling.max_tokens
        if most != UNLIMITED and tokens + most > self.frontend.validator.capacity:
            return "the prompt and max_tokens are too long for it"
        latest = asked.deadline
        if rule.max_wait_s:
            latest = min(latest, time.monotonic() + rule.max_wait_s)
        return self.frontend.dispatcher.why_full(asked.principal.party, int(tokens), latest)


async def route(
    name: str, rules: Sequence[Rule], candidates: Mapping[str, Candidate], asked: Asked
) -> tuple[str, str]:
    """The model for a request, and why. Models that the credential may not use are passed over.
    Raises Forbidden where no other is left, and what reading the request raises."""
    for number, rule in enumerate(rules):
        usable = [
            model
            for model in (rule.use, *rule.fallback)
            if model in candidates and asked.principal.may_use(model)
        ]
        if not usable or not await _holds(rule.when, candidates[usable[0]], asked):
            continue
        why = f"{name}[{number}]"
        if len(usable) == 1:
            return usable[0], why
        full: list[str] = []
        for model in usable:
            reason = await candidates[model].why_full(rule, asked)
            if not reason:
                return model, ", ".join([why, *full])
            full.append(f"{model} is full: {reason}")
        return usable[0], ", ".join([why, *full])
    raise Forbidden(f"{name!r} leads to no model of this credential", "model")


async def _holds(when: When, candidate: Candidate, asked: Asked) -> bool:
    """Whether all conditions hold; what costs most is looked at last."""
    if when.tenant and asked.principal.tenant not in when.tenant:
        return False
    told = {key.lower(): value for key, value in asked.headers.items()} if when.header else {}
    if any(told.get(key.lower()) != value for key, value in when.header.items()):
        return False
    if when.budget_below and not asked.budget_left() < when.budget_below:
        return False
    return not when.prompt_tokens or await candidate.tokens() in when.prompt_tokens
