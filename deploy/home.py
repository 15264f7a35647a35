"""The folder of everything that is kept between runs. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

HOME = "CROSSDOCK_HOME"


def crossdock_home() -> Path:
    """$CROSSDOCK_HOME, else ~/.cache/crossdock; each node has its own. It may not exist yet."""
    home = os.environ.get(HOME)
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "crossdock"
