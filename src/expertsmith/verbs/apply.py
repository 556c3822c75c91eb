"""`apply`: a plan → the smaller checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Unpack

from expertsmith.calibration.opening import inventory_of
from expertsmith.verbs.definition import FLOW, Opt, verb
from expertsmith.verbs.options import Model, Opened, Out, Overwrite, PlanFile, Push, Requantise
from expertsmith.views import show


def _summary(given: Mapping[str, Any]) -> dict[str, Any]:
    from expertsmith.planning.plan import load_plan

    made = load_plan(given["plan"])
    return made.summary.model_dump() if made.summary else {}


def _show(notes: Any, given: Mapping[str, Any]) -> None:
    for note in notes:
        show.line(f"[yellow]note[/yellow] {show.escape(note)}")
    sizes = _summary(given).get("bytes")
    change = f"{show.byte_count(sizes[0])} → {show.byte_count(sizes[1])}" if sizes else ""
    show.line(f"[bold]{show.escape(str(given['out']))}[/bold]  {change}")


@verb(FLOW, show=_show, plain=lambda notes, given: {"out": str(given["out"]), "notes": notes, "summary": _summary(given)})
def apply(
    model: Model,
    plan: PlanFile,
    out: Out,
    *,
    check_values: Annotated[bool, Opt("Check copied tensors for NaN and inf.", "--check-values/--no-check-values")] = True,
    pad: Annotated[
        bool,
        Opt(
            "Layers with different numbers of experts: pad all with dead experts, so that stock engines load the result (selection biases only; saves no memory).",
            "--pad",
        ),
    ] = False,
    requantise: Requantise = False,
    overwrite: Overwrite = False,
    push: Push = None,
    **given: Unpack[Opened],
) -> list[str]:
    """Write the smaller checkpoint, tensor by tensor; the model is never loaded. Returns notes.

    Layers that keep different numbers of experts are written with `per_layer_config`: `expertsmith.load` and transformers with
    trust_remote_code=True run them.

    Args:
        pad: instead, fill such layers up with experts that are never selected, so that stock classes load the result.
        requantise: quantise merged experts of a quantised source again, in its own format; otherwise a merge writes everything in bfloat16.

    Raises:
        UserError: the plan is for another model or breaks a rule, the output exists, the disk is full, NaN in a kept tensor.
    """
    from expertsmith.checkpoint.hub import check_push
    from expertsmith.checkpoint.hub import push as upload
    from expertsmith.planning.plan import load_plan
    from expertsmith.surgery.apply import apply_plan

    if push is not None:
        check_push(push, overwrite)
    loaded = load_plan(plan)
    notes = apply_plan(
        loaded,
        inventory_of(model, given["allow_pickle"]),
        Path(out),
        pad=pad,
        requantise=requantise,
        overwrite=overwrite,
        check_values=check_values,
        progress=given["progress"],
    )
    return notes if push is None else [*notes, f"uploaded to {upload(Path(out), push)}"]
