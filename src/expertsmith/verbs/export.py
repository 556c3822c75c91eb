"""`export`: a plan in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from expertsmith.verbs.definition import MORE, Opt, verb
from expertsmith.verbs.options import Overwrite, PlanFile
from expertsmith.views import show


@verb(
    MORE,
    show=lambda result, given: show.line(f"[bold]{show.escape(str(given['out']))}[/bold]"),
    plain=lambda result, given: {"out": str(given["out"]), "format": given["format"]},
)
def export(
    plan: PlanFile,
    format: Annotated[str, Opt("ordered (JSONL), mask or retained (JSON).", "--format", "-f")],
    out: Annotated[str | Path, Opt("Output file.", "--out", "-o", metavar="OUT", kind=Path, writes="file")],
    *,
    overwrite: Overwrite = False,
) -> None:
    """Write a plan's choice of experts in a format that other tools read; `plan --from FILE` reads them.

    Raises:
        UserError: an unknown format, or a plan that says more than the format holds, or an output that exists.
    """
    from expertsmith.planning.interchange import export as text_of
    from expertsmith.planning.plan import load_plan

    text = text_of(load_plan(plan), format)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(text, encoding="utf-8")
