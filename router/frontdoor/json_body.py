"""JSON bodies: what is read of them, and which field is wrong where one is."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from crossdock.proto.errors import InvalidRequest

Struct = TypeVar("Struct", bound=msgspec.Struct)

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
}


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. NaN and Infinity are read, to be refused under their field.
    Raises InvalidRequest, also for a key that is given twice and for half a character."""
    try:
        text = body.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{body[error.start]:02x} at offset {error.start}"
        raise InvalidRequest("body", bad, "must be UTF-8") from None
    try:
        found = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise InvalidRequest("body", where, "must be valid JSON") from None
    except RecursionError:
        raise InvalidRequest("body", "nested too deeply", "must be plain JSON") from None
    except ValueError:
        limit = "must be plain JSON, its integers of at most 4300 digits"
        raise InvalidRequest("body", "a number that is too long", limit) from None
    if not isinstance(found, dict):
        raise InvalidRequest("body", found, "must be a JSON object")
    if _SURROGATE.search(text):
        _check_strings(found)
    return found


def to_struct(raw: dict[str, Any], kind: type[Struct]) -> Struct:
    """The typed body. Raises InvalidRequest naming the first field that is not as it must be."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _field_error(raw, str(error)) from None


def check_unicode(field: str, text: str) -> None:
    """JSON can spell half a character (a lone surrogate); UTF-8 and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidRequest(field, bad, "must be valid Unicode") from None


def spells_half(text: str, found: Mapping[str, Any]) -> bool:
    """Whether there is half a character in `found`, which the JSON `text` says."""
    try:
        if _SURROGATE.search(text):
            _check_strings(found)
    except InvalidRequest:
        return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(_plain(twice), "given twice", "must be given once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check_strings(found: Mapping[str, Any]) -> None:
    todo: list[tuple[str, Any]] = [("", found)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, str):
            check_unicode(path, value)
        elif isinstance(value, list):
            todo += [(f"{path}[{i}]", entry) for i, entry in enumerate(value)]
        elif isinstance(value, dict):
            for key, entry in value.items():
                here = f"{path}.{_plain(key)}" if path else _plain(key)
                check_unicode(here, key)
                todo.append((here, entry))


def _plain(key: str) -> str:
    """A key that UTF-8 can spell."""
    return key.encode("utf-8", "backslashreplace").decode()


def _field_error(raw: dict[str, Any], message: str) -> InvalidRequest:
    """A schema error, with its value looked up along the path that it names."""
    limit, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if missing := re.match(r"Object missing required field `(\w+)`", limit):
        field = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(field, None, "is required")
    value: Any = raw
    for key in re.findall(r"[^.\[\]]+", path):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            break
    if expected := re.match(r"Expected `([^`]+)`", limit):
        kinds = [_NAMES.get(name, name) for name in expected[1].split(" | ")]
        limit = f"must be {' or '.join(kinds)}"
    return InvalidRequest(path or "body", value, limit[:1].lower() + limit[1:])
