"""What a process says that ends itself, for those who find it gone."""

from __future__ import annotations

import os
from typing import NoReturn

_file: int | None = None


def keep(file: int) -> None:
    """From now on they are written to this descriptor."""
    global _file
    _file = file


def end(why: str) -> NoReturn:
    """Ends this process at once, with status 1. `why` is one line."""
    if _file is not None:
        os.write(_file, why.encode())
    os._exit(1)
