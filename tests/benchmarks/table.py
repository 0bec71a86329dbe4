"""The one table that every benchmark prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

WIDE = 8
"""Columns beyond which a table is set more densely."""


@dataclass(frozen=True)
class Table:
    """columns: headings, the first of which stands over the names of the rows. notes: lines below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def print_table(table: Table, found: Mapping[str, object]) -> None:
    """Print the table of the benchmark that found `found`, its notes, and the hardware that it ran on."""
    space = 1 if len(table.columns) > WIDE else 2
    shown = RichTable(box=None, padding=(0, space), collapse_padding=True, pad_edge=False, header_style="dim")
    for index, heading in enumerate(table.columns):
        shown.add_column(heading, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    lines = [*table.notes]
    if "hardware" in found:
        machine = cast(dict[str, object], found["hardware"])
        lines.append(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB")
    Console().print(Group(shown, Text("\n".join(lines), style="dim")))
