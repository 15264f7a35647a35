"""docs/operations.md says what the spec's definitions say."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import reference, with_reference

from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.registry import ENGINES
from crossdock.proto.settings import walk

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "operations.md"
SMALL = "metadata: {name: x}\nmodel: {id: x}\npools: {NAME: {role: colocated}}"


def test_the_document_is_current(monkeypatch):
    monkeypatch.delitem(ENGINES, "uneven", raising=False)  # of the tests' own
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_reference(text) == text, "run: python tools/reference.py docs/operations.md"


def test_every_field_is_in_it():
    spec = ClusterSpec.parse(SMALL.replace("NAME", "pool"))
    table = reference()
    for path, about, _ in walk(spec):
        assert f"| `{path.replace('pools.pool.', 'pools.NAME.')}` |" in table
        assert about.metadata["doc"]


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="markers"):
        with_reference("# Operations")
