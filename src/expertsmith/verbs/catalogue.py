"""`methods`, `architectures` and `recipes`: what comes along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from expertsmith.errors import UserError
from expertsmith.registry import unknown
from expertsmith.verbs.definition import LOOK, MORE, Opt, verb
from expertsmith.verbs.options import Overwrite
from expertsmith.views import show

COLOURS = {"full": "green", "partial": "yellow", "refused": "red"}
METHOD = ("name", "title", "paper", "reads", "gives", "budgets", "options", "cost", "limits", "doc")


FAMILY = ("model_type", "title", "status", "notes")
RECORD = ("runs_as", "composite", "no_class", "layers", "block", "router", "experts", "shared", "router_output", "score", "selection_bias",
    "logit_bias", "experts_key", "top_k_key", "group_key", "top_group_key", "shared_key", "expert_width_key", "uneven")  # fmt: skip


def _plain_methods(found: Any, given: Mapping[str, Any]) -> Any:
    rows = [{key: getattr(entry, key) for key in METHOD} for entry in found]
    return rows if given["name"] is None else rows[0]


def _show_methods(found: Any, given: Mapping[str, Any]) -> None:
    if given["name"] is None:
        show.show_methods(found)
    else:
        show.show_method(found[0])


@verb(LOOK, show=_show_methods, plain=_plain_methods)
def methods(
    name: Annotated[
        str | None, Opt("Show this one, with its whole text.", argument=True, metavar="[NAME]", shown=False)
    ] = None,
) -> list[Any]:
    """List the methods: what they compute, from what, with which options, and the paper; with NAME, all about one."""
    from expertsmith.methods import find
    from expertsmith.methods import methods as registered

    return list(registered().values()) if name is None else [find(name)]


def _plain_families(rows: Any, given: Mapping[str, Any]) -> Any:
    keys = FAMILY if given["name"] is None else FAMILY + RECORD
    found = [{**{key: getattr(row, key) for key in keys}, "expert_groups": row.group_key is not None} for row in rows]
    return found if given["name"] is None else found[0]


def _show_families(rows: Any, given: Mapping[str, Any]) -> None:
    if given["name"] is not None:
        _show_family(rows[0])
        return
    table = show.table_of("model_type", "family", "status", "notes")
    for row in rows:
        table.add_row(f"[bold]{row.model_type}[/bold]", row.title, _status(row), show.escape(row.notes))
    show.line(table)
    show.line(f"{sum(row.supported for row in rows)} families supported")


def _status(row: Any) -> str:
    return f"[{COLOURS[row.status]}]{row.status}[/]"


def _show_family(row: Any) -> None:
    """What the record says of one family; of a refused one only the reason."""
    show.line(f"[bold]{row.model_type}[/bold]  {show.escape(row.title)}  {_status(row)}")
    if row.notes:
        show.line(show.escape(row.notes))
    if not row.supported:
        return
    block = f"{row.layers}.N" + (f".{row.block}" if row.block else "")
    whole = f", inside a {row.composite} model" if row.composite else ""
    facts = {
        "transformers": f"no class: {row.no_class}" if row.no_class else f"model_type {row.runs_as or row.model_type}{whole}",
        "block": block,
        "router": f"{row.router}, {row.score}",
        "selection bias": ", ".join(row.selection_bias),
        "logit bias": ", ".join(row.logit_bias),
        "experts": row.experts,
        "shared experts": row.shared or "none",
        "number of experts": ", ".join(row.experts_key),
        "experts per token": ", ".join(row.top_k_key),
        "expert_groups": row.group_key or "none",
        "layers of different counts": f"no: {row.uneven}" if row.uneven else "yes",
    }
    show.show_facts(facts)


@verb(LOOK, show=_show_families, plain=_plain_families)
def architectures(
    name: Annotated[str | None, Opt("Show this model_type.", argument=True, metavar="[NAME]", shown=False)] = None,
) -> list[Any]:
    """List the model families: supported, partly supported, or refused with the reason; with NAME, the record of one."""
    from expertsmith.arch import families

    found = families()
    if name is None:
        return list(found.values())
    if name not in found:
        raise unknown("model family", name, found)
    return [found[name]]


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
