"""What names and addresses of the YAML must be, each and together. Pure; raises ConfigError."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import NAME_PATTERN, NAME_RULE, overlap
from crossdock.router.config import TlsFiles

if TYPE_CHECKING:
    from crossdock.deploy.spec import ClusterSpec, PoolSpec

GATEWAY_POOL = "gateway"


def check_url(path: str, url: str) -> None:
    """http or https, a host and a port."""
    if not re.fullmatch(r"https?://[^\s/@]+/?", url):
        raise ConfigError(path, f"{url!r} is not allowed; must be http(s)://HOST:PORT")


def check_pool_names(pools: Mapping[str, PoolSpec]) -> None:
    """Names as processes can have them, and none that is taken."""
    for name in pools:
        if not NAME_PATTERN.fullmatch(name):
            raise ConfigError(f"pools.{name}", f"{name!r} is not a pool name; {NAME_RULE}")
        if name == GATEWAY_POOL:
            raise ConfigError(f"pools.{name}", "is taken by the gateways; choose another name")


def check_ports(spec: ClusterSpec) -> None:
    """No address that is listened on twice."""
    claims = spec.claims()
    for index, (path, address) in enumerate(claims):
        for other_path, other in claims[:index]:
            if overlap(address, other):
                raise ConfigError(path, f"{address!r} is also the port of {other_path}")


def check_tls(files: TlsFiles) -> None:
    """A certificate and its key, or neither."""
    for missing in ("cert", "key"):
        others = [name for name, path in asdict(files).items() if path]
        if others and missing not in others:
            raise ConfigError(f"gateway.tls.{missing}", f"is missing beside {others[0]}")
