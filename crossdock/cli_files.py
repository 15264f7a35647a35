"""Files that commands write when they have worked."""

from __future__ import annotations

from pathlib import Path

import typer


def in_folder(file: Path | None) -> Path | None:
    """An option's callback: what could not be written is refused before the work, not after it.
    Raises BadParameter."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file.parent} is no folder")
    if file is not None and file.is_dir():
        raise typer.BadParameter(f"{file} is a folder")
    return file
