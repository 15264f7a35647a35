"""How many examples Hypothesis tries: as many as a test names, or its share of a profile's."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int, **options: int) -> settings:
    """Tries `count` examples by default, and in proportion where a profile has not 100 of them."""
    share = max(1, count * settings.default.max_examples // 100)
    return settings(max_examples=share, deadline=None, **options)
