"""What outlives the controller's process: the applied spec, the cluster's key, a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from crossdock.deploy.home import crossdock_home
from crossdock.proto.errors import ConfigError, Unavailable

KEY_BYTES = 32


class ClusterStore:
    """The folder of one cluster, readable by its owner alone."""

    def __init__(self, name: str, home: Path | None = None) -> None:
        self.name = name
        self.folder = (home or crossdock_home()) / "clusters" / name
        self.spec_path = self.folder / "spec.yaml"
        self._good_path = self.folder / "good.yaml"
        self._generation_path = self.folder / "generation"
        self._key_path = self.folder / "key"
        self._life_path = self.folder / "life"

    def begin(self, yaml: str, life: str) -> None:
        """A new life of the cluster: its spec and a new key; nothing when `life` has begun."""
        if self._life_path.exists() and self._life_path.read_text() == life:
            return
        self._write(self._key_path, secrets.token_bytes(KEY_BYTES))
        self._good_path.unlink(missing_ok=True)
        self.save_spec(yaml, 1)
        self._write(self._life_path, life.encode())

    def save_spec(self, yaml: str, generation: int) -> None:
        """`generation` counts the specs of this life."""
        self._write(self._generation_path, str(generation).encode())
        self._write(self.spec_path, yaml.encode())

    def generation(self) -> int:
        """Of the spec that is saved."""
        return int(self._generation_path.read_text())

    def save_good(self, yaml: str) -> None:
        """Keeps a spec that was carried out in full, to go back to."""
        self._write(self._good_path, yaml.encode())

    def good_spec(self) -> str:
        """Empty where none was carried out yet."""
        return self._good_path.read_text(encoding="utf-8") if self._good_path.exists() else ""

    def spec(self) -> str:
        """The applied spec, as YAML."""
        return self.spec_path.read_text(encoding="utf-8")

    def key(self) -> bytes:
        """The cluster's key, KEY_BYTES long."""
        return self._key_path.read_bytes()

    def end(self) -> None:
        """Forgets the cluster, so that nothing brings it back."""
        shutil.rmtree(self.folder, ignore_errors=True)

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
            file = path.open("w")
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
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            message = f"{folder} cannot be made: {error.strerror}"
            raise Unavailable(f"{message}; set CROSSDOCK_HOME to a folder that can") from None

    def _write(self, path: Path, data: bytes) -> None:
        self._make(self.folder)
        fresh = path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        fresh.replace(path)
