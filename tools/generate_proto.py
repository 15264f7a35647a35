"""Makes the generated protobuf code: `python tools/generate_proto.py [FOLDER]`, by default
beside the .proto files."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parents[1] / "proto"
# The name that generated modules are imported by, and that .proto files import each other by.
IMPORT_ROOT = "crossdock/proto"


def generate(into: Path) -> list[Path]:
    """Writes *_pb2.py, *_pb2.pyi and *_pb2_grpc.py for every proto/v1/*.proto under `into`."""
    from grpc_tools import protoc

    sources = sorted((PROTO / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{IMPORT_ROOT}={PROTO}"]
        arguments += [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        arguments += [f"{IMPORT_ROOT}/v1/{source.name}" for source in sources]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"protoc failed: {' '.join(arguments)}")
        made = sorted((Path(scratch) / IMPORT_ROOT / "v1").iterdir())
        return [Path(shutil.copy(file, into / file.name)) for file in made]


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if sys.argv[1:] else PROTO / "v1"):
        print(path, file=sys.stderr)
