"""kv.ucx against the variables that the installed UCX really has, by its own account of them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from crossdock.kvtransfer.ucx import check_ucx
from crossdock.proto.errors import ConfigError

# Prints what `ucx_info -c -f` would: each variable under its description.
PRINT = """
import ctypes, glob, os
from importlib.util import find_spec
[folder] = glob.glob(os.path.dirname(find_spec("nixl_cu12").origin) + ".libs")
lazily = os.RTLD_LAZY | ctypes.RTLD_GLOBAL
import nixl_cu12
libraries = {}
for name in ("ucm", "ucs", "uct", "ucp"):
    [path] = glob.glob(f"{folder}/lib{name}-*")
    libraries[name] = ctypes.CDLL(path, lazily)
for path in glob.glob(f"{folder}/ucx/libuct_*.so*"):
    try:
        ctypes.CDLL(path, lazily)
    except OSError:
        pass  # for hardware that is not here
class Filter(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p)]
libc, ucs = ctypes.CDLL(None), libraries["ucs"]
table = ctypes.addressof(ctypes.c_char.in_dll(ucs, "ucs_config_global_list"))
show = ucs.ucs_config_parser_print_all_opts
show.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 2]
show(ctypes.c_void_p.in_dll(libc, "stdout"), b"UCX_", 15, table, ctypes.byref(Filter(None)))
libc.fflush(None)
"""
# What the descriptions of variables that load, write or run something speak of.
TELLING = re.compile(
    r"\b(file name|file to|directory|search path|command|e-mail|plugin|socket path)\b",
    re.IGNORECASE,
)
KNOWN_TO_DO_MORE = {
    *("MODULE_DIR", "MODULES", "PLUGIN_PATH", "GDB_COMMAND", "HANDLE_ERRORS", "ERROR_MAIL_TO"),
    *("LOG_FILE", "PROFILE_FILE", "MEMTRACK_DEST", "VFS_SOCK_PATH", "POSIX_DIR", "PROTO_INFO_DIR"),
}


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """Each variable without its prefix, and its description."""
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = {}
    about: list[str] = []
    for line in done.stdout.splitlines():
        if named := re.match(r"UCX_(\w+)=", line):
            found[named[1]], about = " ".join(about), []
        elif line.startswith("#"):
            about.append(line.strip("# "))
    assert len(found) > 300 and found.keys() >= KNOWN_TO_DO_MORE, "UCX was not understood"
    return found


def allowed(name: str) -> bool:
    try:
        check_ucx("kv.ucx", {name: "1"})
    except ConfigError:
        return False
    return True


def test_no_variable_that_loads_or_writes_or_runs_anything_may_be_set(
    variables: dict[str, str],
) -> None:
    assert not {name for name in KNOWN_TO_DO_MORE if allowed(name)}
    telling = {name: about for name, about in variables.items() if TELLING.search(about)}
    assert len(telling) > 5, "the descriptions were not understood"
    assert not {name: about for name, about in telling.items() if allowed(name)}


def test_most_of_what_ucx_has_may_be_set(variables: dict[str, str]) -> None:
    assert sum(map(allowed, variables)) > 0.8 * len(variables)
