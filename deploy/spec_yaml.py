"""YAML text to ClusterSpec, with the line and field in every error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from crossdock.deploy.spec import ClusterSpec
from crossdock.model.store import KNOWN_MODELS, SIMULATED
from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import check_settings, closest
from crossdock.worker.config import EngineSettings, settings_of

T = TypeVar("T")

_TAG = "tag:yaml.org,2002:"
_TAGS = {str: ["str"], int: ["int"], float: ["int", "float"], bool: ["bool"]}
_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def parse(text: str, file: str) -> ClusterSpec:
    """Raises ConfigError(where="file:line") for the first thing that is wrong."""
    reader = _Reader(file)
    spec = reader.read(_compose(text, file), ClusterSpec, "")
    assert isinstance(spec, ClusterSpec)
    spec = _with_models_beside(spec, file)
    try:
        return spec.validate()
    except ConfigError as error:
        raise error.at(reader.where(error.field)) from None


def parse_settings(text: str, file: str, kind: type[T]) -> T:
    """One dataclass of settings instead of a whole spec, as `parse` has it."""
    reader = _Reader(file)
    made: T = reader.read(_compose(text, file), kind, "")
    try:
        check_settings(made)
    except ConfigError as error:
        raise error.at(reader.where(error.field)) from None
    return made


def _compose(text: str, file: str) -> yaml.Node:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise ConfigError("yaml", error.problem or str(error), where) from None
    except yaml.YAMLError as error:
        raise ConfigError("yaml", str(error), file) from None
    except RecursionError:
        raise ConfigError("yaml", "is nested too deeply", file) from None
    if root is None:
        raise ConfigError("yaml", "the file is empty", file)
    return root


def _with_models_beside(spec: ClusterSpec, file: str) -> ClusterSpec:
    models = {
        name: replace(model, id=_model_beside(model.id, file))
        for name, model in spec.models.items()
    }
    model = replace(spec.model, id=_model_beside(spec.model.id, file))
    return replace(spec, model=model, models=MappingProxyType(models))


def _model_beside(model_id: str, file: str) -> str:
    """A model's path made absolute: from the file's folder where it begins with . or .., from home
    with ~, else from the working folder. The cluster's processes have another one."""
    if model_id.startswith(("./", "../", "~")):
        return _beside(file, model_id)
    if model_id not in ("", SIMULATED, *KNOWN_MODELS) and Path(model_id).exists():
        return os.path.abspath(model_id)
    return model_id


def _beside(file: str, path: str) -> str:
    """A path made absolute: from the file's folder, or home."""
    return os.path.normpath(Path(file).absolute().parent / Path(path).expanduser())


def locate(text: str, file: str, path: str) -> str:
    """file:line of a field in a text that `parse` takes."""
    reader = _Reader(file)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        reader.read(root, ClusterSpec, "")
    return reader.where(path)


class _Reader:
    """Turns nodes into values of the declared types, remembering where each field stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, int] = {}

    def where(self, path: str) -> str:
        """file:line of `path`, or of the nearest enclosing field that the file has."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return f"{self.file}:{self.lines.get(path, 1)}"

    def read(self, node: yaml.Node, kind: Any, path: str) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        named = getattr(kind, "NAMED", {})
        if named and isinstance(node, yaml.ScalarNode):
            if node.value not in named:
                message = f"{node.value!r} is not allowed; one of {', '.join(named)}, or a mapping"
                raise ConfigError(path, message, self._at(node))
            return named[node.value]
        if kind is Any:
            return self._plain(node, path)
        if kind is EngineSettings:
            kind = self._engine_settings(node, path)
        if is_dataclass(kind):
            assert isinstance(kind, type)
            return self._record(node, kind, path)
        if get_origin(kind) is Mapping:
            entry = get_args(kind)[1]
            return MappingProxyType(
                {key: self.read(v, entry, _join(path, key)) for key, v in self._entries(node, path)}
            )
        if get_origin(kind) is tuple:
            return self._list(node, get_args(kind)[0], path)
        return self._scalar(node, kind, path)

    def _record(self, node: yaml.Node, kind: type, path: str) -> Any:
        known = {about.name: about for about in fields(kind)}
        hints = get_type_hints(kind)
        given: dict[str, Any] = {}
        for key, value in self._entries(node, path):
            inner = _join(path, key)
            if key not in known:
                inside = f" of {path}" if path else ""
                message = f"unknown field{inside}; {_suggest(key, known)}"
                raise ConfigError(inner, message, self.where(inner))
            given[key] = self.read(value, hints[key], inner)
            if known[key].metadata.get("kind") == "path" and given[key]:
                given[key] = _beside(self.file, given[key])
        for name, about in known.items():
            required = about.default is MISSING and about.default_factory is MISSING
            if name not in given and required:
                raise ConfigError(_join(path, name), "is missing", self.where(path))
        return kind(**given)

    def _list(self, node: yaml.Node, kind: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise ConfigError(path, f"must be a list, not {_describe(node)}", self._at(node))
        return tuple(self.read(each, kind, f"{path}[{i}]") for i, each in enumerate(node.value))

    def _engine_settings(self, node: yaml.Node, path: str) -> type[EngineSettings]:
        """What may be said of the kind of engine that this node names."""
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        named = [value for key, value in entries if key.value == "kind"]
        try:
            return settings_of(str(named[0].value) if named else "native")
        except ConfigError as error:
            raise ConfigError(_join(path, "kind"), error.message, self._at(named[0])) from None

    def _plain(self, node: yaml.Node, path: str) -> Any:
        """Somebody else's setting: whatever YAML has."""
        if isinstance(node, yaml.MappingNode):
            return {k: self.read(v, Any, _join(path, k)) for k, v in self._entries(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self.read(each, Any, f"{path}[{i}]") for i, each in enumerate(node.value)]
        kinds = {"bool": bool, "int": int, "float": float}
        tag = node.tag.removeprefix(_TAG)
        return None if tag == "null" else self._scalar(node, kinds.get(tag, str), path)

    def _entries(self, node: yaml.Node, path: str) -> Iterable[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            message = f"must be a mapping, not {_describe(node)}"
            raise ConfigError(path or "file", message, self._at(node))
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(path or "file", "a field's name must be a word", self._at(key))
            inner = _join(path, key.value)
            if key.value in entries:
                message = f"is given twice, first on line {self.lines[inner]}"
                raise ConfigError(inner, message, self._at(key))
            self.lines[inner] = key.start_mark.line + 1
            entries[key.value] = value
        return entries.items()

    def _scalar(self, node: yaml.Node, kind: type, path: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in _TAGS[kind]:
            with contextlib.suppress(ValueError, OverflowError, KeyError):
                return kind(yaml.SafeLoader("").construct_object(node))
        quote = "; quote it" if kind is str and isinstance(node, yaml.ScalarNode) else ""
        message = f"must be {_NAMES[kind]}, not {_describe(node)}{quote}"
        raise ConfigError(path, message, self._at(node))

    def _at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _suggest(word: str, known: Collection[str]) -> str:
    if close := closest(word, known):
        return f"did you mean {close}?"
    return f"known are {', '.join(known)}"


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    tag = node.tag.removeprefix(_TAG)
    if tag == "null":
        return "nothing"
    return repr(node.value) if len(node.value) <= 60 else repr(node.value[:60] + "…")
