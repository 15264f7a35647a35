"""Public functions, methods and classes say what they promise: shapes, units, errors, ownership."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

LEAST = 0.90
ROOMS = (
    "crossdock",
    *("proto", "model", "kvcache", "kvtransfer", "engine", "worker"),
    *("prefill", "decode", "deploy", "router"),
)

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(node: ast.AST, owner: str = "") -> Iterator[tuple[str, Documented]]:
    """Everything public in a module or class, with its dotted name."""
    for child in getattr(node, "body", ()):
        if isinstance(child, Documented) and not child.name.startswith("_"):
            yield owner + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{owner}{child.name}.")


def documented(tree: ast.Module) -> dict[str, bool]:
    return {name: bool(ast.get_docstring(node)) for name, node in public(tree)}


def test_what_counts() -> None:
    source = '''
def bare(): ...
def _hidden(): ...
class Kind:
    """Says so."""
    def method(self): "Says so."
    @property
    def size(self): ...
    class _Inner:
        def method(self): ...
'''
    expected = {"bare": False, "Kind": True, "Kind.method": True, "Kind.size": False}
    assert documented(ast.parse(source)) == expected


def test_public_names_have_docstrings() -> None:
    found: dict[str, bool] = {}
    for room in ROOMS:
        spec = importlib.util.find_spec(room if room == "crossdock" else f"crossdock.{room}")
        assert spec is not None and spec.submodule_search_locations
        (folder,) = map(Path, spec.submodule_search_locations)
        for path in sorted(folder.rglob("*.py")):
            if "_pb2" not in path.name:
                where = f"{room}/{path.relative_to(folder)}"
                names = documented(ast.parse(path.read_text(encoding="utf-8")))
                found |= {f"{where} {name}": said for name, said in names.items()}
    missing = [name for name, said in found.items() if not said]
    share = 1 - len(missing) / len(found)
    assert share >= LEAST, f"{share:.1%} of {len(found)}; without one:\n  " + "\n  ".join(missing)
