"""What the command line prints. rich is imported where it is used, so that help is fast."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 160  # wide enough for the widest table where the output is no terminal


def console_of(stderr: bool = False) -> Console:
    """Prints to stdout or stderr."""
    from rich.console import Console

    to = sys.stderr if stderr else sys.stdout
    return Console(file=to, width=None if to.isatty() else FILE_WIDTH, highlight=False)


def table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[object]],
    figures: Container[str] = (),
) -> Table:
    """`rows` under the names of their columns; those named in `figures` are aligned right."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, justify="right" if name in figures else "left")
    for row in rows:
        made.add_row(*map(str, row))
    return made
