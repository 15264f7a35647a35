"""The YAML reference of docs/operations.md, made from the definitions of the spec.

python tools/reference.py docs/operations.md    # writes it between the markers
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from crossdock.deploy.spec import ClusterSpec
from crossdock.worker.config import ENGINES, EngineSettings, settings_of

BEGIN = "<!-- reference: made by tools/reference.py; edit deploy/spec.py instead -->"
END = "<!-- end of reference -->"
_NAMES = {str: "string", int: "whole number", float: "number", bool: "true or false", Any: "value"}


def reference() -> str:
    """A table of every field: name, type and limits, default, meaning."""
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{path}` | {_value(about, kind)} | {_default(about, kind)} | {about.metadata['doc']} |"
        for path, about, kind in _walk(ClusterSpec, "")
    ]
    return "\n".join(lines) + "\n"


def with_reference(document: str) -> str:
    """`document` with what stands between the markers replaced. Raises ValueError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the markers of the reference are missing")
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def _walk(kind: type, prefix: str) -> Iterator[tuple[str, Field[Any], Any]]:
    hints = get_type_hints(kind)
    for about in sorted(fields(kind), key=_as_written):
        path, hint = prefix + about.name, hints[about.name]
        yield path, about, hint
        inner, at = hint, path
        while (origin := get_origin(inner)) is not None:
            listed = origin is tuple
            inner = get_args(inner)[0 if listed else 1]
            at += "[]" if listed else ".NAME"
        if inner is EngineSettings:
            for name in ENGINES:
                inside = list(_walk(settings_of(name), f"{at}."))
                yield from inside if name == next(iter(ENGINES)) else inside[1:]
        elif is_dataclass(inner) and isinstance(inner, type):
            yield from _walk(inner, f"{at}.")


def _as_written(about: Field[Any]) -> int:
    """apiVersion and kind come first in a file, pools after gateway and controller."""
    order = (
        "apiVersion",
        "kind",
        "metadata",
        "model",
        "models",
        "routes",
        "gateway",
        "controller",
        "pools",
    )
    return order.index(about.name) if about.name in order else len(order)


def _value(about: Field[Any], hint: Any) -> str:
    limits = about.metadata
    if is_dataclass(hint):
        return "mapping"
    if get_origin(hint) is tuple:
        entry = get_args(hint)[0]
        return "list of mappings" if is_dataclass(entry) else f"list of {_NAMES[entry]}s"
    if get_origin(hint) is not None:
        entry = get_args(hint)[1]
        by_name = is_dataclass(entry) or get_origin(entry) is tuple
        entries = f"{about.name} by name" if by_name else f"{_NAMES[entry]}s"
        return f"mapping of {entries}"
    if limits["choices"]:
        return "one of " + ", ".join(f"`{choice}`" for choice in limits["choices"] if choice)
    if limits["low"] is not None:
        return f"{_NAMES[hint]}, {limits['low']:,} to {limits['high']:,}"
    return {"address": "HOST:PORT, port 0 takes a free one", "name": "name", "path": "file"}.get(
        limits["kind"], _NAMES[hint]
    )


def _default(about: Field[Any], hint: Any) -> str:
    if is_dataclass(hint):
        return "required" if about.default_factory is MISSING else ""
    if about.default_factory is not MISSING:
        return "`{}`"
    if about.default is MISSING:
        return "required"
    if about.default == ():
        return "`[]`"
    if about.default == "":
        return '`""`'
    return f"`{about.default:g}`" if isinstance(about.default, float) else f"`{about.default}`"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_reference(target.read_text(encoding="utf-8")), encoding="utf-8")
