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

    def begin(self, yaml: str, life: str) -> None:
        """A new life of the cluster: its spec and a new key; nothing when `life` has begun."""
        began = self.folder / "life"
        if began.exists() and began.read_text() == life:
            return
        self._write("key", secrets.token_bytes(KEY_BYTES))
        (self.folder / "good.yaml").unlink(missing_ok=True)
        self.save_spec(yaml, 1)
        self._write("life", life.encode())

    def save_spec(self, yaml: str, generation: int) -> None:
        """`generation` counts the specs of this life."""
        self._write("generation", str(generation).encode())
        self._write(self.spec_path.name, yaml.encode())

    def generation(self) -> int:
        """Of the spec that is saved."""
        return int((self.folder / "generation").read_text())

    def save_good(self, yaml: str) -> None:
        """Keeps a spec that was carried out in full, to go back to."""
        self._write("good.yaml", yaml.encode())

    def good_spec(self) -> str:
        """Empty where none was carried out yet."""
        good = self.folder / "good.yaml"
        return good.read_text(encoding="utf-8") if good.exists() else ""

    def spec(self) -> str:
        """The applied spec, as YAML."""
        return self.spec_path.read_text(encoding="utf-8")

    def key(self) -> bytes:
        """The cluster's key, KEY_BYTES long."""
        return (self.folder / "key").read_bytes()

    def save(self, name: str, data: bytes) -> None:
        """Keeps a file of this life, readable by its owner alone."""
        self._write(name, data)

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

    def _write(self, name: str, data: bytes) -> None:
        self._make(self.folder)
        path = self.folder / name
        fresh = path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        fresh.replace(path)
