"""A comparison in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertsmith.views import show
from expertsmith.views.wording import cells, columns, heading, original_cells, sentences


def show_comparison(found: Mapping[str, Any], out: Path) -> None:
    """A table a ratio and budget, best first, then what they say."""
    for group in found["groups"]:
        rows = group["rows"]
        table = show.table_of(*columns(found, rows), title=heading(group, rows))
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        table.add_row(*(f"[dim]{text}[/dim]" for text in original_cells(found, rows)))
        for row in rows:
            texts = [
                f"[bold]{show.escape(text)}[/bold]" if best else show.escape(text) for text, best in cells(row, found, rows)
            ]
            table.add_row(*texts, style="red" if row["worse_than_random"] else None)
        show.line(table)
    for text in sentences(found):
        show.line(show.escape(text))
    if any(row["worse_than_random"] for group in found["groups"] for row in group["rows"]):
        show.line("[red]†[/red] worse than the mean of the random draws")
    for note in found["notes"]:
        show.line(f"[yellow]note[/yellow] {show.escape(note)}")
    show.line(
        f"[bold]{show.escape(str(out / 'comparison.html'))}[/bold]  (and .json, .md, .svg; plans in {show.escape(str(out / 'plans'))})"
    )
