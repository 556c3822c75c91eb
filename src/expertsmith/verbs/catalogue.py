"""`methods`, `architectures` and `recipes`: what comes along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from expertsmith.errors import UserError
from expertsmith.verbs.definition import LOOK, MORE, Opt, verb
from expertsmith.verbs.options import Overwrite
from expertsmith.views import show

COLOURS = {"full": "green", "partial": "yellow", "refused": "red"}
METHOD = ("name", "title", "paper", "reads", "gives", "budgets", "options", "cost", "limits", "doc")


@verb(
    LOOK,
    show=lambda found, given: show.show_methods(found),
    plain=lambda found, given: [{key: getattr(entry, key) for key in METHOD} for entry in found],
)
def methods() -> list[Any]:
    """List the methods: what they compute, from what, with which options, and the paper."""
    from expertsmith.methods import methods as registered

    return list(registered().values())


def _plain_families(rows: Any, given: Mapping[str, Any]) -> Any:
    keys = ("model_type", "title", "status", "notes")
    return [{**{key: getattr(row, key) for key in keys}, "expert_groups": row.group_key is not None} for row in rows]


def _show_families(rows: Any, given: Mapping[str, Any]) -> None:
    table = show.table_of("model_type", "family", "status", "notes")
    for row in rows:
        status = f"[{COLOURS[row.status]}]{row.status}[/]"
        table.add_row(f"[bold]{row.model_type}[/bold]", row.title, status, show.escape(row.notes))
    show.line(table)
    show.line(f"{sum(row.supported for row in rows)} families supported")


@verb(LOOK, show=_show_families, plain=_plain_families)
def architectures() -> list[Any]:
    """List the model families: supported, partly supported, or refused with the reason."""
    from expertsmith.arch import families

    return list(families().values())


def _show_recipes(found: Any, given: Mapping[str, Any]) -> None:
    if given["name"] is not None:
        show.line(f"[bold]expertsmith run {show.escape(found['out'])}[/bold]")
        return
    for entry in found:
        show.line(f"[bold]{entry['name']}[/bold]  {show.escape(entry['about'])}")
        show.line(f"    [dim]needs {show.escape(entry['needs'])}; {show.escape(entry['size'])}[/dim]")


@verb(MORE, show=_show_recipes)
def recipes(
    name: Annotated[str | None, Opt("Copy this one.", argument=True, metavar="[NAME]", shown=False)] = None,
    to: Annotated[
        str | Path | None, Opt("File or folder to copy it to. Default: NAME.yaml here.", "--to", kind=Path, shown=False)
    ] = None,
    overwrite: Overwrite = False,
) -> Any:
    """List the recipes that come with the package; with NAME, copy one to edit and run."""
    from expertsmith.recipes import copy, shipped

    if name is None and to is not None:
        raise UserError("--to given without a recipe name", "expertsmith recipes NAME --to FILE")
    if name is not None:
        return {"name": name, "out": str(copy(name, Path(to or f"{name}.yaml"), overwrite))}
    return [
        {"name": entry.name, "about": entry.about, "needs": entry.needs, "size": entry.size} for entry in shipped().values()
    ]
