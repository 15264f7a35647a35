"""How long completions are expected to be, learned from those that ended. Pure.

A tenant's completions of prompts of like length (within a factor of two) are alike, far more than
all are: a summary is as short as its prompt is long. What of a class is not known yet is presumed
to be as the mean of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from crossdock.router.placement.demand import OUTPUT_TOKENS

MEMORY = 100.0  # completions that a mean goes back to
PRESUMED = 5.0  # completions that the mean of all counts for in that of a class
MOST_CLASSES = 4096  # of all tenants; the one that was not used for the longest is forgotten


@dataclass
class _Mean:
    tokens: float = 0.0
    weight: float = 0.0

    def observe(self, tokens: int) -> None:
        kept = 1 - 1 / MEMORY
        self.tokens = kept * self.tokens + tokens
        self.weight = kept * self.weight + 1

    def with_presumed(self, presumed: float) -> float:
        return (self.tokens + PRESUMED * presumed) / (self.weight + PRESUMED)


@dataclass
class Lengths:
    """Means over tenants and classes of prompts, the newest counting most."""

    _all: _Mean = field(default_factory=_Mean)
    _classes: dict[tuple[str, int], _Mean] = field(default_factory=dict)  # by last use

    def ended(self, tenant: str, prompt_tokens: int, generated: int) -> None:
        """A completion had so many tokens."""
        self._all.observe(generated)
        key = (tenant, prompt_tokens.bit_length())
        mean = self._classes.pop(key, None) or _Mean()
        mean.observe(generated)
        self._classes[key] = mean
        if len(self._classes) > MOST_CLASSES:
            del self._classes[next(iter(self._classes))]

    @property
    def mean(self) -> float:
        """Of any completion."""
        return self._all.with_presumed(OUTPUT_TOKENS)

    def expected(self, tenant: str, prompt_tokens: int, most: int, generated: int = 0) -> float:
        """Tokens still to come of a completion that may have `most` and has `generated`. One that
        is longer than expected has half of that before it, whatever it has: long ones go on."""
        mean = self._classes.get((tenant, prompt_tokens.bit_length()))
        length = mean.with_presumed(self.mean) if mean else self.mean
        return max(1.0, min(most - generated, max(length - generated, length / 2)))
