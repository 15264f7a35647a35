"""An environment for each client, made once for its pinned versions."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

DONE = ".installed"


def cache() -> Path:
    """$CROSSDOCK_CLIENTS, else ~/.cache/crossdock-clients."""
    chosen = os.environ.get("CROSSDOCK_CLIENTS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "crossdock-clients"


def environment(
    name: str, pip: Sequence[str], npm: Sequence[str], without: Sequence[str] = ()
) -> Path:
    """The folder of these packages, installed on the first call; those of `without` are removed
    once all is there. Raises RuntimeError."""
    pinned = hashlib.sha256(" ".join([*pip, "|", *npm, "|", *without]).encode()).hexdigest()[:8]
    folder = cache() / f"{name}-{pinned}"
    if not (folder / DONE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if npm:
            _call("npm", "install", "--silent", "--prefix", str(folder), *npm)
        else:
            _install(folder, pip, without)
        (folder / DONE).touch()
    return folder


def _install(folder: Path, packages: Sequence[str], without: Sequence[str]) -> None:
    """With uv where it is there, which takes seconds where pip takes minutes."""
    python = str(folder / "bin" / "python")
    if uv := shutil.which("uv"):
        _call(uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder))
        pip, options, confirmed = [uv, "pip"], ["--quiet", "--python", python], []
    else:
        _call(sys.executable, "-m", "venv", str(folder))
        pip, options, confirmed = [python, "-m", "pip"], ["--quiet"], ["--yes"]
    _call(*pip, "install", *options, *packages)
    if without:
        _call(*pip, "uninstall", *options, *confirmed, *without)


def _call(*words: str) -> None:
    with tempfile.TemporaryFile("w+") as said:
        if subprocess.run(words, stdout=said, stderr=said, check=False).returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words)}\n{said.read()[-3000:]}")
