"""Tables of text, for the terminal, as Markdown, and for TensorBoard."""

import io
import textwrap
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells as text; `totals` are rows that stand apart below.

    The first `names` columns are left-aligned; the last `details` are for a page, being too many for a terminal.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    totals: list[list[str]]
    names: int = 1
    details: int = 0
    note: str = ""


def table_markdown(table: Table) -> str:
    """As Markdown, for a page."""
    alignment = [":--" if column < table.names else "--:" for column in range(len(table.columns))]
    totals = [[f"**{cell}**" if cell else "" for cell in row] for row in table.totals]
    lines = [table.columns, alignment, *table.rows, *totals]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return _page(table, body)


def table_preformatted(table: Table) -> str:
    """As Markdown whose table is preformatted text, which TensorBoard scrolls: in cells it breaks words at any letter,
    and all of them are left-aligned."""
    file = io.StringIO()
    Console(file=file, width=1000, color_system=None).print(rich_table(table, whole=True))
    lines = [line.rstrip() for line in file.getvalue().splitlines()[1:]]  # the first is the title
    text = textwrap.dedent("\n".join(lines)).strip("\n")
    return _page(table, f"```\n{text}\n```")


def _page(table: Table, body: str) -> str:
    note = table.note.replace("\n", "  \n")
    return "\n\n".join(part for part in (f"## {table.title}", body, note) if part)


def rich_table(table: Table, whole: bool = False) -> RichTable:
    """For a terminal: without the columns that are details, unless the `whole` table is asked for."""
    shown = len(table.columns) - (0 if whole else table.details)
    rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    rich.show_header = any(table.columns)
    for column, header in enumerate(table.columns[:shown]):
        width = max((len(row[column]) for row in [*table.rows, *table.totals]), default=0)
        narrow = textwrap.wrap(header, max(width, *map(len, header.split()), 1), break_on_hyphens=False)
        rich.add_column("\n".join(narrow), justify="left" if column < table.names else "right")
    for row in table.rows:
        rich.add_row(*row[:shown])
    rich.add_section()
    for row in table.totals:
        rich.add_row(*row[:shown], style="bold")
    return rich
