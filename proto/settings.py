"""Settings that document and check themselves: dataclass fields with limits.

The owner of a setting declares it once. The YAML shows it under a name of its own (`of`), and is
read, checked and documented from that declaration.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

from crossdock.proto.errors import ConfigError

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
NAME_RULE = "must be 1 to 40 of a-z, 0-9 and -, not beginning or ending with -"
GATEWAY_ADDRESS = "127.0.0.1:50051"  # both as they are where the YAML says nothing else
CONTROLLER_ADDRESS = "127.0.0.1:50050"
EVERY_HOST = {"0.0.0.0", "::"}  # gRPC takes either for both families
LOOPBACK = ({"localhost", "127.0.0.1"}, {"localhost", "::1"})


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Collection[str | int] = (),
    kind: str = "",
    check: Callable[[str, Any], None] | None = None,
    factory: Any = MISSING,
) -> Any:
    """A field with its documentation and limits. `kind`: "address", "name", "text", "path"
    (of a file, in the YAML from its own folder) or "". `check`
    is called with the field's path and value, and raises ConfigError."""
    about = {"doc": doc, "low": low, "high": high, "choices": choices, "kind": kind, "check": check}
    return field(default=default, default_factory=factory, metadata=about)


def of(owner: type, name: str) -> Any:
    """The setting `name` as its owner declares it, for a record of the YAML; see `given`."""
    about = next(about for about in fields(owner) if about.name == name)
    return field(
        default=about.default,
        default_factory=about.default_factory,
        metadata={**about.metadata, "of": name},
    )


def given(record: Any) -> dict[str, Any]:
    """What a record of the YAML says of its owner's settings, by the owner's names."""
    shared = [about for about in fields(record) if "of" in about.metadata]
    values = {about.metadata["of"]: getattr(record, about.name) for about in shared}
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def closest(word: str, known: Collection[str]) -> str:
    """The known name that a misspelt one was meant to be; "" where none is like it."""
    return "".join(difflib.get_close_matches(word, known, n=1, cutoff=0.6))


def no_entries() -> Mapping[str, Any]:
    return MappingProxyType({})


def walk(spec: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every leaf as (dotted path, its field, its value)."""
    for about in fields(spec):
        path, value = prefix + about.name, getattr(spec, about.name)
        if is_dataclass(value):
            yield from walk(value, path + ".")
        elif isinstance(value, Mapping) and any(map(_nested, value.values())):
            for key, entry in value.items():
                yield from _walk_entry(entry, f"{path}.{key}")
        elif _nested(value):
            yield from _walk_entry(value, path)
        else:
            yield path, about, value


def _nested(value: Any) -> bool:
    """Whether it is a record, or a list of some."""
    return is_dataclass(value) or (isinstance(value, tuple) and any(map(is_dataclass, value)))


def _walk_entry(entry: Any, path: str) -> Iterator[tuple[str, Field[Any], Any]]:
    if isinstance(entry, tuple):
        for number, each in enumerate(entry):
            yield from walk(each, f"{path}[{number}].")
    else:
        yield from walk(entry, f"{path}.")


def check_settings(record: Any, prefix: str = "") -> None:
    """Raises ConfigError at the first setting outside its limits; its path begins with `prefix`."""
    for path, about, value in walk(record, prefix):
        if "doc" in about.metadata:
            _check_value(path, about, value)


def _check_value(path: str, about: Field[Any], value: Any) -> None:
    low, high = about.metadata["low"], about.metadata["high"]
    choices, kind = about.metadata["choices"], about.metadata["kind"]
    if choices and value not in choices:
        raise ConfigError(path, f"{value!r} is not allowed; one of {', '.join(map(str, choices))}")
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(path, f"{value!r} is not allowed; must be from {low:g} to {high:g}")
    if kind == "text" and not value.strip():
        raise ConfigError(path, "must not be empty")
    if kind == "name" and not NAME_PATTERN.fullmatch(value):
        raise ConfigError(path, f"{value!r} is not allowed; {NAME_RULE}")
    if kind == "address":
        try:
            split_address(value)
        except ValueError as error:
            raise ConfigError(path, f"{value!r} is not allowed; {error}") from None
    if about.metadata["check"] is not None:
        about.metadata["check"](path, value)


@functools.lru_cache(1024)
def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; IPv6 hosts in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("must be HOST:PORT with a port from 0 to 65535")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("an IPv6 host must stand in brackets, as in [::1]:8000")
    return host.strip("[]"), int(port)


def loopback_host(host: str) -> bool:
    """Whether nobody but this host can reach it there; a name is not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether host:port is of this machine's loopback."""
    return loopback_host(address.rpartition(":")[0])


def overlap(address: str, other: str) -> bool:
    """Whether no two servers can have these "host:port"; port 0 takes a free one. Raises
    ValueError."""
    (host, port), (other_host, other_port) = split_address(address), split_address(other)
    hosts = {host, other_host}
    same = len(hosts) == 1 or EVERY_HOST & hosts
    return port == other_port != 0 and bool(same or hosts in LOOPBACK)
