"""What outlives the controller's process: the applied spec, the cluster's secrets, a lock.

It is one document, written whole: in a folder of the controller's node, and in a mirror where the
cluster's members are looked up, so that a controller that comes back on another node finds it.
Whichever copy of this life was written last is right.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

from crossdock.deploy.home import crossdock_home
from crossdock.proto.errors import ConfigError, Unavailable

KEY_BYTES = 32
KEY = "key"  # the cluster's key among the secrets
DOCUMENT = "state.json"


class Mirror(Protocol):
    """Where a store's document is kept as well. Every method may raise Unavailable."""

    def load(self) -> bytes:
        """The document; empty where there is none."""

    def save(self, document: bytes) -> None:
        """Keeps it in place of the one before."""

    def end(self) -> None:
        """Forgets it."""


class NoMirror:
    """For a store that is its folder alone."""

    def load(self) -> bytes:
        """Nothing."""
        return b""

    def save(self, document: bytes) -> None:
        """Keeps nothing."""

    def end(self) -> None:
        """Has nothing to forget."""


@dataclass(frozen=True)
class _State:
    """One document. `version` counts how often it was written in its life, `generation` the
    specs."""

    life: str = ""
    version: int = 0
    generation: int = 0
    spec: str = ""
    good: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)  # of autoscaled pools, by name
    secrets: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    def pack(self) -> bytes:
        encoded = {name: base64.b64encode(data).decode() for name, data in self.secrets.items()}
        return json.dumps(asdict(replace(self, secrets={})) | {"secrets": encoded}).encode()

    @classmethod
    def parse(cls, document: bytes) -> _State:
        """An empty one where the document is damaged, or of another version of Crossdock."""
        try:
            read: dict[str, Any] = json.loads(document)
            decoded = {name: base64.b64decode(data) for name, data in read["secrets"].items()}
            return cls(**(read | {"secrets": decoded}))
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()


class ClusterStore:
    """The document of one cluster; its folder is readable by its owner alone."""

    def __init__(self, name: str, home: Path | None = None, mirror: Mirror | None = None) -> None:
        self.name = name
        self.folder = (home or crossdock_home()) / "clusters" / name
        self._mirror = mirror or NoMirror()
        self._read: _State | None = None

    def begin(self, yaml: str, life: str, first_secrets: Mapping[str, bytes] | None = None) -> None:
        """A life of the cluster: goes on with the newest document of `life` that folder or mirror
        has, else begins one with that spec, a new key and `first_secrets`. Raises Unavailable."""
        found = [_State.parse(each) for each in (self._on_disk(), self._mirror.load())]
        newest = max(found, key=lambda state: (state.life == life, state.version))
        if newest.life == life:
            self._read = newest
            if found[0] != found[1]:
                self._keep(newest)
            return
        fresh = {KEY: secrets.token_bytes(KEY_BYTES), **(first_secrets or {})}
        self._read = _State(life)
        self._change(generation=1, spec=yaml, secrets=fresh)

    def save_spec(self, yaml: str, generation: int) -> None:
        """`generation` counts the specs of this life. Raises Unavailable, as all that write do:
        then nothing has changed."""
        self._change(spec=yaml, generation=generation)

    def generation(self) -> int:
        """Of the spec that is saved."""
        return self._state.generation

    def save_good(self, yaml: str) -> None:
        """Keeps a spec that was carried out in full, to go back to."""
        self._change(good=yaml)

    def good_spec(self) -> str:
        """Empty where none was carried out yet."""
        return self._state.good

    def spec(self) -> str:
        """The applied spec, as YAML."""
        return self._state.spec

    def save_sizes(self, sizes: Mapping[str, int]) -> None:
        """Keeps how many workers autoscaled pools are to have."""
        self._change(sizes=dict(sizes))

    def sizes(self) -> dict[str, int]:
        """Of autoscaled pools, as far as any was decided."""
        return dict(self._state.sizes)

    def save_secrets(self, changed: Mapping[str, bytes]) -> None:
        """Adds or replaces these secrets, all of them or none."""
        self._change(secrets={**self._state.secrets, **changed})

    def secret(self, name: str) -> bytes:
        """Empty where this life has none of that name."""
        return self._state.secrets.get(name, b"")

    def key(self) -> bytes:
        """The cluster's key, KEY_BYTES long."""
        return self._state.secrets[KEY]

    def save(self, name: str, data: bytes) -> None:
        """Keeps a file of this life, readable by its owner alone."""
        self._write(name, data)

    def end(self) -> None:
        """Forgets the cluster, so that nothing brings it back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(Unavailable):  # gone with all it held
            self._mirror.end()

    @property
    def _state(self) -> _State:
        if self._read is None:
            self._read = _State.parse(self._on_disk())
        return self._read

    def _change(self, **changes: Any) -> None:
        changed = replace(self._state, version=self._state.version + 1, **changes)
        self._keep(changed)
        self._read = changed

    def _keep(self, state: _State) -> None:
        """The mirror first: where it fails, nothing has changed here either."""
        document = state.pack()
        self._mirror.save(document)
        self._write(DOCUMENT, document)

    def _on_disk(self) -> bytes:
        try:
            return (self.folder / DOCUMENT).read_bytes()
        except OSError:
            return b""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by the one `crossdock up` of this name on this machine. Raises ConfigError, and
        Unavailable where CROSSDOCK_HOME cannot be written."""
        self._make(self.folder.parent)
        path = self.folder.parent / f"{self.name}.lock"
        with self._own(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _own(self, path: Path) -> IO[str]:
        while True:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            file = os.fdopen(descriptor, "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    return file
            except FileNotFoundError:
                pass  # its last owner removed it meanwhile
            except BlockingIOError:
                file.close()
                message = f"{self.name!r} is being served by another `crossdock up`"
                raise ConfigError("metadata.name", message) from None
            file.close()

    def _make(self, folder: Path) -> None:
        """Raises Unavailable. Private even where a folder of that name was there and was not."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it is not a folder of this user")
            folder.chmod(0o700)
        except OSError as error:
            message = f"{folder} cannot be made: {error.strerror}"
            raise Unavailable(f"{message}; set CROSSDOCK_HOME to a folder that can") from None

    def _write(self, name: str, data: bytes) -> None:
        self._make(self.folder.parent)
        self._make(self.folder)
        path = self.folder / name
        fresh = path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        fresh.replace(path)
