"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDTH_OF_A_PIPE = 160
SHORT = 24


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH_OF_A_PIPE
) -> None:
    """Print rows of plain text. Short columns keep their width, long ones wrap; those without content are left out.

    ``width`` is that of a pipe; a terminal has its own.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.show_header = any(columns)
    shown = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    for index in shown:
        widest = max(len(row[index]) for row in rows)
        table.add_column(Text(columns[index]), no_wrap=widest <= SHORT, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))
    console = Console()
    (console if console.is_terminal else Console(width=width)).print(table)
