"""Settings of UCX: what Crossdock changes of its defaults, which of them a YAML may set, and how a
process is given them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from crossdock.proto.errors import ConfigError

# A link that dies without a word ends every transfer over it within about 10 s, TCP's own patience
# would be a quarter of an hour: what was sent and not acknowledged (USER_TIMEOUT), what is awaited
# (KEEP*), and connecting (SYN_CNT; NB, or the one thread that calls UCX would stand still for it).
# RDMA's own timeouts are of that order already.
DEFAULTS: Mapping[str, str] = {
    "TCP_USER_TIMEOUT": "10s",
    "TCP_KEEPIDLE": "4s",
    "TCP_KEEPINTVL": "2s",
    "TCP_KEEPCNT": "3",
    "TCP_SYN_CNT": "3",
    "TCP_CONN_NB": "y",
}
# Where all peers are on this host: UCX then listens nowhere else.
ON_LOOPBACK: Mapping[str, str] = {"NET_DEVICES": "lo"}

# Which transports and devices, how much at once and for how long: by whole names, and by families
# of one transport or protocol each. The rest loads code, writes files, mails or starts a debugger.
# fmt: off
_SETTINGS = {
    "TLS", "NET_DEVICES", "SHM_DEVICES", "ACC_DEVICES", "SELF_DEVICES", "PROTOS", "PROTO_ENABLE",
    "ALLOC_PRIO", "ADAPTIVE_PROGRESS", "ADDRESS_VERSION", "ATOMIC_MODE", "BCOPY_BW",
    "BCOPY_THRESH", "CM_USE_ALL_DEVICES", "CONNECT_ALL_TO_ALL", "DISTANCE_BW", "DISTANCE_LAT",
    "DYNAMIC_TL_PROGRESS_FACTOR", "DYNAMIC_TL_SWITCH_INTERVAL", "FENCE_MODE", "FLUSH_WORKER_EPS",
    "LISTENER_BACKLOG", "LOG_LEVEL", "MULTI_LANE_MAX_RATIO", "MULTI_PATH_RATIO", "NODE_LOCAL_ID",
    "NUM_EPS", "NUM_PPN", "PREFER_OFFLOAD", "PROTO_EMULATION_ENABLE", "PROTO_INDIRECT_ID",
    "PROTO_INFO", "PROTO_OVERHEAD", "PROTO_REQUEST_RESET", "RECOVERY_RETRIES",
    "RESOLVE_REMOTE_EP_ID", "SA_DATA_VERSION", "SEG_SIZE", "SELECT_DISTANCE_MD",
    "SINGLE_NET_DEVICE", "SOCKADDR_TLS_PRIORITY", "TOPO_PRIO", "UNIFIED_MODE", "USE_MT_MUTEX",
    "WARN_INVALID_CONFIG", "WARN_UNUSED_ENV_VARS", "WIREUP_VIA_AM_LANE", "ZCOPY_THRESH",
}
# fmt: on
_FAMILY = re.compile(
    "(TCP|IB|RC|UD|DC|GGA|SRD|EFA|RDMACM|CUDA|GDR|ROCM|ZE|SYSV|POSIX|MM|SM|SCOPY|CMA|KNEM|XPMEM"
    "|SELF|KEEPALIVE|MAX|MEMTYPE|MIN|RCACHE|REG_NONBLOCK|RKEY|RMA|RNDV|RX_MPOOL|TM)(_[A-Z0-9]+)+"
)
_NAMES_A_FILE = re.compile("(FILE|DIR|PATH|DEST|COMMAND)$")


def check_ucx(path: str, settings: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable that does not tune a transport."""
    for name, value in settings.items():
        tunes = name in _SETTINGS or (_FAMILY.fullmatch(name) and not _NAMES_A_FILE.search(name))
        if name.startswith("UCX_"):
            message = f"{name!r} is not allowed; leave UCX_ out"
        elif not tunes:
            message = (
                f"{name!r} is not allowed; only what tunes a transport is, as TLS, NET_DEVICES, "
                "TCP_*, IB_*, RC_*, UD_*: UCX loads code and writes files as others say"
            )
        elif not (value.isascii() and value.isprintable()):
            message = f"{value!r} is not allowed; must be printable ASCII"
        else:
            continue
        raise ConfigError(f"{path}.{name}", message)


@contextmanager
def environment(settings: Mapping[str, str], loopback: bool = False) -> Iterator[None]:
    """UCX takes its settings from the environment, when an agent is made. `settings`, without the
    prefix, go before what the environment says, that before DEFAULTS. `loopback`: all peers are on
    this host."""
    wanted = {f"UCX_{name}": str(value) for name, value in settings.items()}
    for name, value in {**DEFAULTS, **(ON_LOOPBACK if loopback else {})}.items():
        wanted.setdefault(f"UCX_{name}", os.environ.get(f"UCX_{name}", value))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old
