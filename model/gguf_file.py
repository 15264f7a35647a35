"""Reading GGUF: metadata and tensors, through the gguf package. Imports no torch.

The package's reader makes an array object of every string of every array, 1.6 s for a vocabulary
of 49,152; here arrays become plain lists in one pass, and a process parses a file once.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType

from crossdock.proto.errors import ModelError


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file; its tensors are mapped, not read."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]  # shape: innermost first; data: quantized rows

    def require(self, key: str) -> Any:
        """The value under a metadata key. Raises ModelError where there is none."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: metadata {key} is missing")
        return self.metadata[key]

    def tensor(self, name: str) -> gguf.ReaderTensor:
        """A tensor by its GGUF name, quantized as stored. Raises ModelError where there is none."""
        if name not in self.tensors:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]


# Of one layer of the family that has every tensor there is.
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight` in a GGUF file."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    first = _NAMES[f"model.layers.0.{inner}"]
    return f"{first.replace('blk.0.', f'blk.{layer}.')}.{kind}"


def open_gguf(path: Path) -> GGUFFile:
    """Maps the file and reads its metadata. Raises ModelError for anything but a whole GGUF."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    return _open(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, _mtime_ns: int) -> GGUFFile:
    if size < 24:
        raise ModelError(f"{path}: {size} bytes are too few for a GGUF file")
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise ModelError(f"{path}: truncated or not a GGUF file: {error}") from error
    metadata = {
        key: reader.arrays[key] if key in reader.arrays else field.contents()
        for key, field in reader.fields.items()
    }
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


class _Reader(GGUFReader):
    """Parses arrays into `arrays` by itself and leaves everything else to the package."""

    def __init__(self, path: Path) -> None:
        self.arrays: dict[str, list[Any]] = {}
        self._last_array: list[Any] | None = None
        super().__init__(path)

    def _push_field(self, field: gguf.ReaderField, skip_sum: bool = False) -> int:
        if self._last_array is not None:
            self.arrays[field.name], self._last_array = self._last_array, None
        return super()._push_field(field, skip_sum)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        if self.byte_order != "I":
            raise ValueError("the byte order is not this machine's")
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if item_type == GGUFValueType.STRING:
            end, self._last_array = _read_strings(self.data.data, start, count)
        else:
            values = self._get(start, self.gguf_scalar_to_np[item_type], count)
            if len(values) != count:
                raise ValueError(f"an array of {count} items ends after {len(values)}")
            end, self._last_array = start + values.nbytes, values.tolist()
        return end - orig_offs, [], [], [GGUFValueType.ARRAY, item_type]


def _read_strings(data: memoryview, offset: int, count: int) -> tuple[int, list[str]]:
    """`count` strings from `offset` on, each after its length; and where they end."""
    length_at = struct.Struct("<Q").unpack_from
    strings = []
    for _ in range(count):
        start = offset + 8
        offset = start + length_at(data, offset)[0]
        if offset > len(data):
            raise ValueError(f"a string ends at byte {offset} of {len(data)}")
        strings.append(str(data[start:offset], "utf-8", "replace"))
    return offset, strings
