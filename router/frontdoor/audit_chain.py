"""The audit log's lines: each carries the hash of the one before, and checkpoints are signed.

A line is a JSON object with `n`, its number, and `prev`, the SHA-256 of the line before. What is
written together ends with a checkpoint, whose `signature` (Ed25519) is over its `prev` and so over
all before it. FILE.head says which line was the last, signed as well, so that lines taken from the
end are missed. Rotated files are FILE.000001 and so on; numbers and hashes go on through them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from crossdock.proto.errors import NotFound
from crossdock.router.dispatch.request import request_id_of

FIRST = "0" * 64  # `prev` of line 0
MAX_FOUND = 20


def signing_key(cluster_key: bytes) -> bytes:
    """The seed of a cluster's audit signatures, 32 bytes."""
    return hmac.digest(cluster_key, b"crossdock.audit.v1", "sha256")


@dataclass
class Chain:
    """Makes lines one after another, from line `n` after the line with hash `prev`."""

    seed: bytes = field(repr=False)
    n: int = 0
    prev: str = FIRST

    def __post_init__(self) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(self.seed)
        self.public = self._key.public_key().public_bytes_raw().hex()

    def line(self, record: dict[str, Any]) -> bytes:
        """The next line, with its end."""
        data = json.dumps(
            {"n": self.n, "prev": self.prev, **record}, ensure_ascii=False, separators=(",", ":")
        ).encode("utf-8", "backslashreplace")
        self.n, self.prev = self.n + 1, line_hash(data)
        return data + b"\n"

    def checkpoint(self, unix: float) -> bytes:
        """A signed line over all before it."""
        signature = self._key.sign(_signed("checkpoint", self.n, self.prev)).hex()
        record = {"kind": "checkpoint", "time": unix, "key": self.public, "signature": signature}
        return self.line(record)

    def head(self) -> bytes:
        """What FILE.head holds: the last line."""
        signature = self._key.sign(_signed("head", self.n, self.prev)).hex()
        head = {"lines": self.n, "hash": self.prev, "key": self.public, "signature": signature}
        return json.dumps(head).encode() + b"\n"


def line_hash(line: bytes) -> str:
    """Of a line without its end."""
    return hashlib.sha256(line).hexdigest()


def _signed(kind: str, n: int, digest: str) -> bytes:
    return f"crossdock.audit.v1 {kind} {n} {digest}".encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Findings:
    """What a log was found to be."""

    lines: int
    requests: int
    keys: Sequence[str]  # that signed it, public, hexadecimal
    wrong: Sequence[str]  # one sentence each; empty: it is whole


def in_order(files: Iterable[Path]) -> list[Path]:
    """Each file after those that were rotated out of it."""
    found: dict[Path, None] = {}
    for file in files:
        rotated = [each for each in file.parent.glob(f"{file.name}.*") if each.suffix[1:].isdigit()]
        found |= dict.fromkeys([*sorted(rotated), file])
    return list(found)


def verify(files: Sequence[Path], trusted: Sequence[str] = (), partial: bool = False) -> Findings:
    """Looks at one gateway's log, its files in order. `trusted`: the public keys that may sign it;
    any, where there are none. `partial`: its oldest files may be gone. Raises OSError."""
    wrong: list[str] = []
    keys: dict[str, None] = {}
    n, prev, requests, signed = 0, FIRST, 0, 0
    known: dict[int, tuple[str, str]] = {}  # by number, a line's hash and who signed it
    strangers: set[str] = set()
    begun = False
    for where, data in _lines(files):
        if len(wrong) >= MAX_FOUND:
            break
        digest = line_hash(data.rstrip(b"\n"))
        try:
            line = json.loads(data)
            number, before = line["n"], line["prev"]
            if type(number) is not int or not isinstance(before, str):
                raise TypeError("n is a number, prev a text")
        except (ValueError, KeyError, TypeError, RecursionError):
            wrong.append(f"{where}: is no line of an audit log, or a part of one")
            prev, n = digest, n + 1
            continue
        if not begun and partial:
            n, prev = number, before
        begun = True
        if number != n:
            wrong.append(f"{where}: is line {number} where line {n} was due: missing or moved")
        elif before != prev:
            wrong.append(f"{where}: line {number} does not follow from the one before: changed")
        if line.get("kind") == "opened" and (why := line.get("unlike_head")):
            wrong.append(f"{where}: when its gateway started, {why}")
        if line.get("kind") == "checkpoint":
            signed = number + 1
            keys[str(line.get("key"))] = None
            if not _holds(line, _signed("checkpoint", number, before)):
                wrong.append(f"{where}: the signature of line {number} does not hold")
            elif why := _stranger(line, trusted, strangers):
                wrong.append(f"{where}: {why}")
        requests += line.get("kind") == "request"
        n, prev = number + 1, digest
        known[number] = digest, str(line.get("key", ""))
    if signed != n:
        wrong.append(f"the last {n - signed} lines are not signed: cut off, or their gateway died")
    if files and len(wrong) < MAX_FOUND:
        wrong += _check_head(files[-1], known, n, trusted, strangers)
    return Findings(n, requests, list(keys), wrong)


def find_request(
    files: Sequence[Path], request_id: str, tenant: str | None = None
) -> dict[str, Any]:
    """The newest line of a request, by its id or that of its answer; that of a refusal only where
    there is no other. An id is the client's word, so that several tenants may have one: `tenant`
    says whose is meant. Raises NotFound."""
    asked, found = request_id, dict[str, Any]()
    request_id = request_id_of(request_id)
    for _, data in _lines(files):
        if request_id.encode() in data:
            line = json.loads(data)
            named = line.get("id") in (asked, request_id) or asked == line.get("response")
            if tenant is not None and line.get("tenant") != tenant:
                continue
            if named and ("choices" in line or "choices" not in found):
                found = line
    if not found:
        whose = "" if tenant is None else f" of tenant {tenant!r}"
        raise NotFound(f"request {asked!r}{whose} is not in {', '.join(map(str, files))}")
    return found


def head_of(file: Path) -> Path:
    """What says which line of a log is the last."""
    return file.with_name(file.name + ".head")


def read_head(file: Path) -> dict[str, Any] | None:
    """The head of a log with its `lines` and `hash`; None where there is none that can be read."""
    try:
        head: dict[str, Any] = json.loads(head_of(file).read_bytes())
        good = type(head["lines"]) is int and isinstance(head["hash"], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return head if good else None


def unlike_head(file: Path, public: str) -> str:
    """Why a log is not what its head says, which may be behind; empty where it is. `public`: the
    key of who is to go on with it. Raises OSError."""
    head = read_head(file)
    count, told, last = 0, 0, b""
    try:
        for _, data in _lines([file]):
            if head is None:
                return "its head was missing"
            if not count:
                told = head["lines"] - json.loads(data)["n"]
            if count == told:
                return _unlike(head, last, str(json.loads(data)["prev"]), public)
            count, last = count + 1, data.rstrip(b"\n")
        if head is None or not count:
            return ""
        if count == told:
            return _unlike(head, last, line_hash(last), public)
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a line was none of its own"
    return f"{told - count} lines were missing at its end" if told > count else "its head was older"


def _unlike(head: dict[str, Any], last: bytes, digest: str, public: str) -> str:
    """The same, where `last` is the line that the head tells of, and `digest` that line's hash."""
    if head["hash"] != digest:
        return "other lines had been signed"
    signers = {public, json.loads(last)["key"]} if last else {public}
    if head["key"] in signers and _holds(head, _signed("head", head["lines"], head["hash"])):
        return ""
    return "its head was signed by another"


def _check_head(
    file: Path,
    known: dict[int, tuple[str, str]],
    lines: int,
    trusted: Sequence[str],
    strangers: set[str],
) -> list[str]:
    path, head = head_of(file), read_head(file)
    if head is None:
        return [f"{path}: cannot be read, so lines may be missing at the end"]
    told, digest = head["lines"], head["hash"]
    if not _holds(head, _signed("head", told, digest)):
        return [f"{path}: its signature does not hold"]
    if why := _stranger(head, trusted, strangers):
        return [f"{path}: {why}"]
    if told > lines:
        return [f"{file}: has {lines} lines where there were {told}: cut off at the end"]
    signed, signer = known.get(told - 1, (digest, head["key"]))
    if signed != digest:
        return [f"{file}: line {told - 1} is not the one that was signed: changed"]
    if signer != head["key"]:
        return [f"{path}: is signed by another than line {told - 1}, which it tells of"]
    return []


def _stranger(signed: dict[str, Any], trusted: Sequence[str], known: set[str]) -> str:
    """Says once of each key that it is none of those that may sign."""
    key = str(signed.get("key"))
    if not trusted or key in trusted or key in known:
        return ""
    known.add(key)
    return f"from here on it is signed by {key}, which is none of the keys that may sign it"


def _holds(line: dict[str, Any], data: bytes) -> bool:
    try:
        public = str(line["key"])
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(line["signature"]), data)
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return False
    return True


def _lines(files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        with file.open("rb") as opened:
            for number, data in enumerate(opened, 1):
                yield f"{file}:{number}", data
