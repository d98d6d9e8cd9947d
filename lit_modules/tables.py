"""Tables of text, for the terminal and as Markdown."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
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
    alignment = [":--" if column < table.names else "--:" for column in range(len(table.columns))]
    totals = [[f"**{cell}**" if cell else "" for cell in row] for row in table.totals]
    lines = [table.columns, alignment, *table.rows, *totals]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    note = table.note.replace("\n", "  \n")
    return "\n\n".join(part for part in (f"## {table.title}", body, note) if part)


def rich_table(table: Table) -> RichTable:
    """For a terminal: without the columns that are details."""
    shown = len(table.columns) - table.details
    rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    rich.show_header = any(table.columns)
    for column, header in enumerate(table.columns[:shown]):
        rich.add_column(header, justify="left" if column < table.names else "right")
    for row in table.rows:
        rich.add_row(*row[:shown])
    rich.add_section()
    for row in table.totals:
        rich.add_row(*row[:shown], style="bold")
    return rich
