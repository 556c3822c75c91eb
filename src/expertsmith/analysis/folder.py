"""The output folder of `analyze`: `measures.json`, `report.html`, and the collected statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertsmith.analysis.study import write_json
from expertsmith.errors import UserError
from expertsmith.views.pages.analysis import write_page

MEASURES, PAGE = "measures.json", "report.html"
OWN = {MEASURES, PAGE, f"{MEASURES}.partial", f"{PAGE}.partial", "stats", "reference.stats"}


def prepare(folder: Path) -> None:
    """Refuse a folder with other files; results of an earlier run are replaced when the new ones are complete.

    Raises:
        UserError: a file, or a folder with other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "choose a folder with -o")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in OWN) if folder.exists() else []
    if foreign:
        raise UserError(f"{folder} contains files that are not an analysis ({foreign[0]})", "choose another folder with -o")


def write(folder: Path, measures: Mapping[str, Any]) -> None:
    """Write both files, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MEASURES, measures)
    write_page(folder / PAGE, measures)
