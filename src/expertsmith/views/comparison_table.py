"""Show a comparison in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertsmith.views import show
from expertsmith.views.wording import ABOVE, RISE, cells, columns, heading, original_cells, sentences

KEPT = ("method", RISE)  # columns that stay at any width


def show_comparison(found: Mapping[str, Any], out: Path) -> None:
    """Print a table per ratio and budget, best first, then sentences, notes and files."""
    hidden: list[str] = []
    for group in found["groups"]:
        table, left_out = fitting(group, found)
        hidden.extend(left_out)
        show.line(table)
    if hidden:
        show.line(f"[dim]left out, for the width of this terminal: {show.escape(', '.join(dict.fromkeys(hidden)))}[/dim]")
    for text in sentences(found):
        show.line(show.escape(text))
    if any(row["worse_than_random"] for group in found["groups"] for row in group["rows"]):
        show.line("[red]†[/red] worse than the mean of the random draws")
    for note in found["notes"]:
        show.line(f"[yellow]note[/yellow] {show.escape(note)}")
    show.line(
        f"[bold]{show.escape(str(out / 'comparison.html'))}[/bold]  (and .json, .md, .svg; plans in {show.escape(str(out / 'plans'))})"
    )


def fitting(group: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """(table of a group that fits the terminal, the columns left out for it, least important first). The method and its mean increase
    always stay; a name that is still too long is folded."""
    from rich.console import Console

    console, head = Console(), columns(found, group["rows"])
    endless = console.options.update(width=10_000)
    left_out: list[str] = []
    table = _table(group, found, left_out)
    for name in sorted(head, key=lambda name: _importance(name, found)):
        if console.measure(table, options=endless).maximum <= console.width or name in KEPT:
            break
        left_out.append(name)
        table = _table(group, found, left_out)
    return table, left_out


def _importance(name: str, found: Mapping[str, Any]) -> int:
    """The position of a column in the order in which columns are left out."""
    domains, tasks = list(found["original"]["domains"]), list(found["original"].get("tasks", {}))
    order = [
        "memory",
        "plan s",
        "parameters",
        "top-1",
        "experts",
        "KL",
        *reversed(domains),
        "bytes",
        *reversed(tasks),
        ABOVE,
        *KEPT,
    ]
    return order.index(name)


def _table(group: Mapping[str, Any], found: Mapping[str, Any], left_out: Sequence[str]) -> Any:
    rows = group["rows"]
    kept = [place for place, name in enumerate(columns(found, rows)) if name not in left_out]
    table = show.table_of(*(columns(found, rows)[place] for place in kept), title=heading(group, rows))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    original = original_cells(found, rows)
    table.add_row(*(f"[dim]{original[place]}[/dim]" for place in kept))
    for row in rows:
        texts = cells(row, found, rows)
        marked = (
            f"[bold]{show.escape(text)}[/bold]" if best else show.escape(text) for text, best in map(texts.__getitem__, kept)
        )
        table.add_row(*marked, style="red" if row["worse_than_random"] else None)
    return table
