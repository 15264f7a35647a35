"""JSON schemas drawn at random, as they come from clients: nested, optional, in several scripts."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["name", "größe", "город", "名前", "a b", 'q"uote', "emoji 🙂", "id", "tags", "x-1", "é\\n"]
WORDS = ["red", "blau", "зелёный", "青", "🙂", 'with "quotes"', "line\nbreak", "", "a/b\\c"]


def random_schema(seed: int, depth: int = 3) -> dict[str, Any]:
    """An object at the top; the same for the same seed."""
    return _object(random.Random(seed), depth)


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_enum, _const, _string, _integer, _boolean, _null, _date]
    if depth > 0:
        kinds += [_object, _object, _array, _either]
    return rng.choice(kinds)(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    required = [name for name in names if rng.random() < 0.6]
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1) for name in names},
        "additionalProperties": False,
    }
    return made | ({"required": required} if required else {})


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(rng, depth - 1),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample([*WORDS, 1, -2.5, True, None], rng.randint(1, 4))}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice([*WORDS, 7, None, {"a": [1, "b"]}])}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^[0-9]{3}-[A-F]+$"])}
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "null"}


def _date(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": "date"}
