"""Which variables of UCX a YAML may set, and what UCX is given on one host."""

from __future__ import annotations

import os

import pytest

from crossdock.kvtransfer import ucx
from crossdock.proto.errors import ConfigError

TUNES = (
    *("TLS", "NET_DEVICES", "TCP_KEEPIDLE", "TCP_PORT_RANGE", "IB_GID_INDEX", "RC_TIMEOUT"),
    *("RC_MLX5_PATH_MTU", "UD_VERBS_TIMEOUT", "DC_MLX5_NUM_DCI", "CUDA_IPC_CACHE", "RNDV_THRESH"),
    *("MAX_RMA_RAILS", "KEEPALIVE_INTERVAL", "LOG_LEVEL", *ucx.DEFAULTS, *ucx.ON_LOOPBACK),
)
DOES_MORE = (
    *("MODULE_DIR", "MODULES", "PLUGIN_PATH", "CONFIG_DIR", "GDB_COMMAND", "HANDLE_ERRORS"),
    *("ERROR_MAIL_TO", "LOG_FILE", "PROFILE_FILE", "PROFILE_MODE", "STATS_DEST", "MEMTRACK_DEST"),
    *("VFS_SOCK_PATH", "POSIX_DIR", "PROTO_INFO_DIR", "MEM_MMAP_HOOK_MODE", "DEBUG_SIGNO"),
    *("IB_SOME_FILE", "tls", "TLS ", "TLS=x", "TCP_", "TCP_\n", "", "LD_PRELOAD"),
)


@pytest.mark.parametrize("name", TUNES)
def test_what_tunes_a_transport_may_be_set(name: str) -> None:
    ucx.check_ucx("kv.ucx", {name: "1"})


@pytest.mark.parametrize("name", DOES_MORE)
def test_what_does_more_may_not(name: str) -> None:
    with pytest.raises(ConfigError, match="only what tunes a transport"):
        ucx.check_ucx("kv.ucx", {"TLS": "tcp", name: "1"})


def test_workers_on_one_host_are_not_reached_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with ucx.environment({}):
        assert "UCX_NET_DEVICES" not in os.environ
    with ucx.environment({}, loopback=True):
        assert os.environ["UCX_NET_DEVICES"] == "lo"
    with ucx.environment({"NET_DEVICES": "mlx5_0:1"}, loopback=True):
        assert os.environ["UCX_NET_DEVICES"] == "mlx5_0:1", "who says otherwise gets it"
