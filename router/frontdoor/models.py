"""Which model serves a request: by name, by alias, or by a route's rules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from crossdock.proto.errors import NotFound, show
from crossdock.router.dispatch.metrics import GatewayMetrics
from crossdock.router.frontdoor.frontend import Arrival, Frontend, Prepared
from crossdock.router.frontdoor.gate import Gate
from crossdock.router.frontdoor.pace import Pace
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.routes import Asked, Candidate, route
from crossdock.router.frontdoor.tokenized import Tokenized
from crossdock.router.serving import Rule

Prepare = Callable[[Frontend], Awaitable[Prepared]]


@dataclass(frozen=True)
class Choice:
    """The model of a request, and the request as that model's tokenizer has it."""

    frontend: Frontend
    prepared: Prepared


class Models:
    """The models that a gateway serves now. `become` changes them; a request that has chosen keeps
    what it chose."""

    def __init__(self, gate: Gate, metrics: GatewayMetrics) -> None:
        self.gate, self.metrics = gate, metrics
        self._by_name: dict[str, Frontend] = {}
        self._names: dict[str, str] = {}  # of models and aliases -> model
        self._routes: Mapping[str, Sequence[Rule]] = {}
        self._pace = Pace()

    def become(self, frontends: Sequence[Frontend], routes: Mapping[str, Sequence[Rule]]) -> None:
        """From now on there are these, at least one, in this order."""
        self._by_name = {frontend.model_id: frontend for frontend in frontends}
        self._names = {name: name for name in self._by_name}
        for frontend in frontends:
            self._names |= dict.fromkeys(frontend.aliases, frontend.model_id)
        self._routes = routes
        self.gate.only_model = frontends[0].model_id if len(frontends) == 1 else ""

    @property
    def default(self) -> Frontend:
        """For a request that names no model, and for what is common to all."""
        return next(iter(self._by_name.values()))

    @property
    def ready(self) -> bool:
        """Whether any of them could serve a prompt from its first token to its last."""
        return any(frontend.dispatcher.ready for frontend in self._by_name.values())

    def routes_of(self, principal: Principal) -> list[str]:
        """Names for which rules choose a model, where a credential may use one that they lead to.
        Without those that are a model's or an alias as well."""
        return [
            name
            for name, rules in self._routes.items()
            if name not in self._names
            and any(map(principal.may_use, (m for r in rules for m in (r.use, *r.fallback))))
        ]

    def of(self, principal: Principal) -> list[Frontend]:
        """Those that a credential may use, in their order."""
        return [each for name, each in self._by_name.items() if principal.may_use(name)]

    def find(self, name: str, principal: Principal) -> Frontend:
        """The model of this name or alias; the first where it is empty. Raises NotFound, which
        names those that the credential may use."""
        if not name:
            return self.default
        found = self._names.get(name)
        if found is None:
            known = [each.model_id for each in self.of(principal)] + self.routes_of(principal)
            are = "model of this cluster is" if len(known) == 1 else "models of this cluster are"
            listed = ", ".join(map(repr, known))
            raise NotFound(f"model: {show(name)} is not served here; the {are} {listed or 'none'}")
        return self._by_name[found]

    def seen(self, name: str, principal: Principal) -> Frontend:
        """The same, for who only asks about it. Raises Forbidden too."""
        frontend = self.find(name, principal)
        principal.check_model([frontend.model_id])
        return frontend

    async def choose(
        self,
        name: str,
        arrival: Arrival,
        prepare: Prepare,
        *,
        headers: Mapping[str, str],
        tenant: str,
    ) -> Choice:
        """The model for a request by this name, which its visit has from then on. `prepare` reads
        the request for a model; `headers` have names in lower case, or of any. Raises NotFound,
        and what `prepare` raises."""
        visit = arrival.visit
        principal = visit.principal.named(tenant)
        await self._pace.begin(principal.party)
        rules = self._routes.get(name)
        if rules is None:
            frontend = self.find(name, principal).asked_by(principal.party)
            visit.chose(frontend.model_id, name)
            return Choice(frontend, await prepare(frontend))
        asked = Asked(
            principal, headers, lambda: self.gate.limiter.budget_left(principal), arrival.deadline
        )
        tokenized = Tokenized()
        candidates = {
            each: Candidate(frontend.asked_by(principal.party, tokenized), prepare)
            for each, frontend in self._by_name.items()
        }
        model, why = await route(name, rules, candidates, asked)
        visit.chose(model, name, why)
        self.metrics.routed.inc(1, name, model)
        return Choice(candidates[model].frontend, await candidates[model].prepared())
