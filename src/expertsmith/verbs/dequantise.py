"""`dequantise`: a quantised checkpoint as plain bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from expertsmith.checkpoint import open_checkpoint
from expertsmith.verbs.definition import FLOW, verb
from expertsmith.verbs.options import Named, Opened, Out, Overwrite
from expertsmith.views import show


def _show(found: Any, given: Mapping[str, Any]) -> None:
    before, after = (show.byte_count(size) for size in found["bytes"])
    show.line(
        f"{found['weights']:,} weights decoded ({show.escape(found['format'])}), {found['tensors']:,} tensors read back as written  "
        f"[bold]{show.escape(str(given['out']))}[/bold]  {before} → {after}"
    )
    for note in found["notes"]:
        show.line(f"[dim]{show.escape(note)}[/dim]")


@verb(FLOW, show=_show, plain=lambda found, given: {"out": str(given["out"]), **found})
def dequantise(model: Named, out: Out, *, overwrite: Overwrite = False, **given: Unpack[Opened]) -> dict[str, Any]:
    """Write a quantised checkpoint as plain bfloat16, one tensor at a time, and read it back.

    Every other command works on the quantised checkpoint itself; this is for tools that do not. `expertsmith inspect` names the format.

    Raises:
        UserError: nothing is quantised, or a format that cannot be decoded exactly.
    """
    from expertsmith.surgery.dequantise import dequantise as write

    opened = open_checkpoint(model, allow_pickle=given["allow_pickle"])
    return write(opened, Path(out), overwrite=overwrite, progress=given["progress"])
