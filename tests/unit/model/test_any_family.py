"""Models that this project's own engine does not know: their files, tokenizer and limits are read
for engines that do, and refused as before for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model

from crossdock.deploy.spec import ClusterSpec
from crossdock.model.config import load_limits
from crossdock.model.store import resolve
from crossdock.model.text import load_text
from crossdock.proto.errors import ModelError


def model(folder: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """A folder whose config.json is another one."""
    path = make_tiny_model(folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in without} | change))
    return folder


def test_a_family_from_elsewhere_is_read_for_engines_that_know_it_alone(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"model_type": "mixtral", "num_local_experts": 4})
    with pytest.raises(ModelError, match="model_type 'mixtral' is not supported"):
        resolve(str(folder))
    files = resolve(str(folder), any_family=True)
    same = make_tiny_model(tmp_path / "same")
    assert files.digest and files.digest != resolve(str(same)).digest  # of config.json as well
    text = load_text(files)
    assert (text.vocab_size, text.context_length) == (384, 2048)
    assert text.decode(text.encode("freight")) == "freight"


def test_limits_of_a_model_of_more_than_text_are_those_of_its_text(tmp_path: Path) -> None:
    inner = {"vocab_size": 384, "max_position_embeddings": 4096, "eos_token_id": [2, 7]}
    change = {"model_type": "gemma3", "text_config": inner, "eos_token_id": 1}
    folder = model(tmp_path / "m", change, ("vocab_size", "max_position_embeddings"))
    limits = load_limits(resolve(str(folder), any_family=True))
    assert (limits.vocab_size, limits.context_length) == (384, 4096)
    assert limits.eos_token_ids == (1, 2, 7)


@pytest.mark.parametrize("value, why", [(0, "must be at least 1"), ("x", "is not a whole|number")])
def test_limits_that_cannot_be_are_refused(tmp_path: Path, value: object, why: str) -> None:
    folder = model(tmp_path / "m", {"model_type": "mixtral", "max_position_embeddings": value})
    with pytest.raises(ModelError, match=why):
        load_limits(resolve(str(folder), any_family=True))


YAML = """\
metadata: {name: c}
models: {one: {id: a}, other: {id: b}}
pools:
  p: {role: prefill, model: one, engine: {kind: vllm}}
  d: {role: decode, model: one, engine: {kind: vllm}}
  c: {role: colocated, model: other, engine: {kind: native}}
"""


def test_what_a_model_may_be_goes_by_the_engines_that_serve_it() -> None:
    spec = ClusterSpec.parse(YAML)
    assert {field: spec.any_family(field) for field in spec.sources} == {
        "models.one.id": True,
        "models.other.id": False,
    }
    alone = YAML.replace("models: {one: {id: a}, other: {id: b}}", "model: {id: a}")
    alone = alone.replace(" model: one,", "").replace(" model: other,", "")
    assert not ClusterSpec.parse(alone).any_family("model.id")
    same = alone.replace("{kind: native}", "{kind: vllm}")
    assert ClusterSpec.parse(same).any_family("model.id")
