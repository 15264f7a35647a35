"""What Ray accepts of an actor's resources and labels, restated so that a YAML is checked without
Ray: see ray._common.ray_option_utils, ray._private.accelerators and label_utils (2.60)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import split_address

LEAST_AMOUNT = 0.0001
BUILT_IN = {
    "CPU": "use resources.cpus",
    "GPU": "use resources.gpus",
    "memory": "use resources.memory_mb",
    "object_store_memory": "workers need none of it",
    "bundle": "take another name",
}
LENT_WHOLE = {"HPU", "neuron_cores", "RBLN", "FURIOSA", "MBLT", "TTNPU"}  # accelerators
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL_KEY = re.compile(rf"([a-zA-Z0-9]([a-zA-Z0-9_.-]{{0,251}}[a-zA-Z0-9])?/)?{_LABEL}")
LABEL_VALUE = re.compile(rf"(!?{_LABEL}|!?(in)?\({_LABEL}(, ?{_LABEL})*\))?")
LABEL_RULE = "1 to 63 of a-z, A-Z, 0-9, -, _ and ., a letter or digit first and last"


def check_amount(path: str, amount: float, least: float = 0.0) -> None:
    """Raises ConfigError, as all of these do."""
    if amount != least and not LEAST_AMOUNT <= amount < float("inf"):
        raise ConfigError(path, f"{amount!r} is not allowed; Ray's least is {LEAST_AMOUNT:.4f}")
    if path.endswith(".gpus") and amount > 1 and amount % 1:
        raise ConfigError(path, f"{amount!r} is not allowed; above 1 it must be whole")


def check_resources(path: str, resources: Mapping[str, float]) -> None:
    """Raises ConfigError for names and amounts of resources that Ray would refuse."""
    for name, amount in resources.items():
        field = f"{path}.{name}"
        if name in BUILT_IN:
            raise ConfigError(field, f"{name!r} is Ray's own resource; {BUILT_IN[name]}")
        if not (name and name.isascii()):
            raise ConfigError(field, f"{name!r} is not allowed; must be ASCII, not empty")
        check_amount(field, amount, LEAST_AMOUNT)
        if name in LENT_WHOLE and amount % 1:
            raise ConfigError(field, f"{amount!r} is not allowed; Ray lends {name} whole")
        if name == "TPU" and amount not in (1, 2, 4, 8):
            raise ConfigError(field, f"{amount!r} is not allowed; Ray lends 1, 2, 4 or 8 of a TPU")


def check_ray_address(path: str, address: str) -> None:
    """Raises ConfigError for what is neither empty, auto nor HOST:PORT: Ray imports the module
    that stands before a ://."""
    if address in ("", "auto"):
        return
    try:
        split_address(address)
    except ValueError as error:
        raise ConfigError(path, f"{address!r} is not allowed; {error}, or auto") from None


def check_labels(path: str, labels: Mapping[str, str]) -> None:
    """Raises ConfigError for labels that Ray would refuse."""
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            raise ConfigError(f"{path}.{key}", f"{key!r} is no label key: [PREFIX/]{LABEL_RULE}")
        if not LABEL_VALUE.fullmatch(value):
            message = f"{value!r} is no label value: {LABEL_RULE}; or !A, or in(A,B)"
            raise ConfigError(f"{path}.{key}", message)
