"""API keys: a file of their hashes, and how keys are made and recognized.

A key is xd-ID-SECRET: the id is for looking up and for people, the secret 256 random bits. What
cannot be guessed needs no slow hash, so the file holds the SHA-256 of each whole key.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import yaml

from crossdock.proto.errors import ConfigError, NotFound
from crossdock.proto.settings import check_settings
from crossdock.router.config import KeyLimits
from crossdock.router.frontdoor.principal import (
    LEAST_URGENT,
    MOST_TENANT,
    MOST_URGENT,
    Principal,
)

PREFIX = "xd-"
ID_BYTES, SECRET_BYTES = 6, 32
NOBODY = "0" * 64  # is compared with where an id is not known, which takes as long
_KEY = re.compile(r"xd-([A-Za-z0-9_.]{1,64})-([A-Za-z0-9_-]{16,256})")
_ID = re.compile(r"[A-Za-z0-9_.]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "hash": str,
    "tenant": str,
    "models": list,
    "max_priority": int,
    "shared_cache": bool,
    "metrics": bool,
    "limits": dict,
    "expires": (str, date, int, float),
}
_HEAD = "# API keys of a Crossdock cluster, as hashes. Made and ended by `crossdock keys`.\n"


@dataclass(frozen=True)
class Keys:
    """The keys of one file: hash and principal of each, by id."""

    entries: Mapping[str, tuple[str, Principal]]

    def find(self, key: str) -> Principal | None:
        """Whose key this is. Takes as long for an unknown id as for a wrong secret."""
        match = _KEY.fullmatch(key)
        wanted, principal = self.entries.get(match[1] if match else "", (NOBODY, None))
        equal = hmac.compare_digest(digest(key), wanted)
        return principal if equal else None


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(data: bytes) -> Keys:
    """The keys of a file. Raises ConfigError that names the entry and the field."""
    entries: dict[str, tuple[str, Principal]] = {}
    for place, entry in _entries(data):
        hashed, principal = _read(place, entry)
        if principal.key_id in entries:
            raise ConfigError(f"{place}.id", f"{principal.key_id!r} is there twice")
        entries[principal.key_id] = hashed, principal
    return Keys(entries)


def make_key() -> tuple[str, str]:
    """A new key and its id."""
    key_id = secrets.token_hex(ID_BYTES)
    return f"{PREFIX}{key_id}-{secrets.token_hex(SECRET_BYTES)}", key_id


def add_key(path: Path, principal: Mapping[str, Any]) -> str:
    """Makes a key with these fields of an entry, and adds it to the file, which is made where it is
    not there. Returns the key, which is kept nowhere. Raises ConfigError."""
    key, key_id = make_key()
    entry = {"id": key_id, "hash": f"sha256:{digest(key)}", **principal}
    _, made = _read("key", entry)
    if made.expires is not None and made.expires <= time.time():
        raise ConfigError("key.expires", f"{principal['expires']!r} has passed")
    with _changing(path, missing_ok=True) as entries:
        entries.append(entry)
    return key


def revoke_key(path: Path, key_id: str) -> None:
    """Takes a key out of the file. Raises NotFound."""
    with _changing(path) as entries:
        kept = [entry for entry in entries if entry.get("id") != key_id]
        if len(kept) == len(entries):
            raise NotFound(f"key: {key_id!r} is not in {path}")
        entries[:] = kept


def list_keys(path: Path) -> list[Principal]:
    """Whose keys a file has. Raises ConfigError."""
    return [principal for _, principal in parse_keys(_data(path)).entries.values()]


@contextmanager
def _changing(path: Path, missing_ok: bool = False) -> Iterator[list[dict[str, Any]]]:
    """The file's entries, which take its place as a whole once they are changed and in order. Who
    else changes it waits meanwhile."""
    target = path.resolve()
    with _locked(target):
        data = b"" if missing_ok and not path.exists() else _data(path)
        parse_keys(data)
        entries = [entry for _, entry in _entries(data)]
        yield entries
        text = _HEAD + yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        parse_keys(text.encode())
        _replace(target, text)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Held by one process at a time, through a file beside it: the file itself is replaced."""
    beside = target.with_name(f".{target.name}.lock")
    try:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError("keys", f"{beside}: {error.strerror}", str(target)) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(target: Path, text: str) -> None:
    """Readers find the file as it was or as it is to be, never a part of it."""
    number, made = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:  # mkstemp: for the owner alone
            _as_before(target, number)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, target)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


def _as_before(path: Path, descriptor: int) -> None:
    """Gives a new file the owner and mode of the one at `path`, if that is there: a gateway of
    another user than who changes it is to read it again."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (about.st_uid, about.st_gid):
        os.fchown(descriptor, about.st_uid, about.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(about.st_mode))


def _data(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError("keys", f"cannot be read: {error.strerror}", str(path)) from None


def _entries(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("keys", f"is neither YAML nor JSON: {error}") from None
    if found is None:
        return
    if not isinstance(found, list):
        raise ConfigError("keys", f"must be a list of entries, not {type(found).__name__}")
    for i, entry in enumerate(found):
        if not isinstance(entry, dict):
            raise ConfigError(f"keys[{i}]", "must be a mapping")
        yield f"keys[{i}]", entry


def _read(place: str, entry: Mapping[str, Any]) -> tuple[str, Principal]:
    for name, value in entry.items():
        kind = _KINDS.get(name)
        if kind is None:
            known = ", ".join(_KINDS)
            raise ConfigError(f"{place}.{name}", f"unknown field; known are {known}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{place}.{name}", f"{value!r} is not allowed")
    for name in ("id", "hash", "tenant"):
        if not entry.get(name):
            raise ConfigError(f"{place}.{name}", "is missing")
    if len(entry["tenant"]) > MOST_TENANT:
        length = len(entry["tenant"])
        raise ConfigError(f"{place}.tenant", f"has {length} characters, more than {MOST_TENANT}")
    if not _ID.fullmatch(entry["id"]):
        raise ConfigError(f"{place}.id", f"{entry['id']!r} is not allowed")
    hashed = _HASH.fullmatch(entry["hash"])
    if hashed is None:
        raise ConfigError(f"{place}.hash", "must be sha256: and 64 hexadecimal digits")
    models = entry.get("models", [])
    if not all(isinstance(model, str) for model in models):
        raise ConfigError(f"{place}.models", "must be a list of names")
    priority = entry.get("max_priority", 0)
    if not MOST_URGENT <= priority <= LEAST_URGENT:
        raise ConfigError(f"{place}.max_priority", f"{priority} is not allowed; 32 bits")
    return hashed[1], Principal(
        tenant=entry["tenant"],
        key_id=entry["id"],
        models=frozenset(models),
        max_priority=priority,
        shared_cache=entry.get("shared_cache", False),
        metrics=entry.get("metrics", False),
        limits=read_limits(f"{place}.limits", entry.get("limits", {})),
        expires=_moment(f"{place}.expires", entry.get("expires")),
        account=f"key {entry['id']}",
    )


def read_limits(place: str, given: Mapping[str, Any]) -> KeyLimits:
    """Limits as a file says them. Raises ConfigError, also for a name that is not known."""
    defaults = asdict(KeyLimits())
    for name, value in given.items():
        if name not in defaults:
            known = ", ".join(about.name for about in fields(KeyLimits))
            raise ConfigError(f"{place}.{name}", f"unknown field; known are {known}")
        wanted = (int, float) if isinstance(defaults[name], float) else type(defaults[name])
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ConfigError(f"{place}.{name}", f"{value!r} is not allowed")
    limits = KeyLimits(**given)
    check_settings(limits, f"{place}.")
    return limits


def _moment(place: str, given: Any) -> float | None:
    """Unix seconds of a date, a date and time (UTC where it says no zone) or such seconds."""
    if given is None or isinstance(given, int | float):
        return given
    try:
        when = datetime.fromisoformat(given if isinstance(given, str) else given.isoformat())
    except ValueError:
        raise ConfigError(place, f"{given!r} is not allowed; as in 2027-01-31") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
