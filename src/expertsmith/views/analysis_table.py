"""Show the measures in a terminal: summary, verdicts, and one line per layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertsmith.views.show import escape, line, table_of

COLOURS = {
    "supported": "green",
    "partly": "yellow",
    "weak": "yellow",
    "mixed": "yellow",
    "not supported": "red",
    "not testable": "dim",
}
COLUMNS = {
    "gate\ncosine": ("static", "projections", "gate", "neuron_similarity"),
    "out-\nputs": ("sample", "output_similarity"),
    "norm\nρ": ("sample", "norm_score_rho", "mean"),
    "scores\nentr.": ("usage", "all", "routing_entropy_share"),
    "load\nentr.": ("usage", "all", "load_entropy_share"),
    "un-\nused": ("usage", "all", "unused"),
    "domain\ninfo": ("usage", "specialisation", "information_share"),
    "turn": ("usage", "all", "turn"),
}


def show_measures(measures: Mapping[str, Any], out: Path) -> None:
    """Print the measures."""
    for sentence in measures["summary"]:
        line(escape(sentence))
    rows = measures["layers"]
    used = {name: path for name, path in COLUMNS.items() if any(_at(row, path) is not None for row in rows)}
    table = table_of("layer", *used, title="By layer")
    for row in rows:
        table.add_row(str(row["layer"]), *(_cell(_at(row, path)) for path in used.values()))
    line(table)
    for found in measures["observations"]:
        colour = COLOURS[found["verdict"]]
        line(f"[{colour}]{found['verdict']:13}[/] [bold]{found['observation']}. {escape(found['title'])}[/bold]")
        line(f"              {escape(found['text'])}")
    for note in measures["notes"]:
        line(f"[yellow]note[/yellow] {escape(note)}")
    line(f"[bold]{escape(str(out / 'report.html'))}[/bold]  (numbers: {escape(str(out / 'measures.json'))})")


def _at(row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _cell(value: Any) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
