"""Tables of the command line. rich is imported where one is made, so that help is fast."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


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
