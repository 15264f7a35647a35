"""What was tokenized for one request. A route may ask several models how long its prompt is, and
those of one family have one tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tokenized:
    """Token ids of one request's texts, and of its one conversation."""

    _ids: dict[Hashable, list[int]] = field(default_factory=dict)

    async def once(self, key: Hashable, make: Callable[[], Awaitable[list[int]]]) -> list[int]:
        """What `make` gave for this key, which says all that its answer depends on."""
        if key not in self._ids:
            self._ids[key] = await make()
        return self._ids[key]
