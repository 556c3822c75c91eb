"""`compare`: many methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Unpack

from expertsmith.verbs.apply import apply
from expertsmith.verbs.calibrate import calibrate
from expertsmith.verbs.definition import FLOW, Opt, out_and, verb
from expertsmith.verbs.evaluate import Limit, TaskPath, Tasks
from expertsmith.verbs.heal import heal as heal_model
from expertsmith.verbs.options import SPECS, Calibrating, Data, Named
from expertsmith.verbs.plan import plan


def _show(found: Any, given: Mapping[str, Any]) -> None:
    from expertsmith.comparison.results import displayed
    from expertsmith.views.comparison_table import show_comparison

    show_comparison(displayed(found), Path(given["out"]))


@verb(FLOW, show=_show, keeps=out_and(""), ranks=True)
def compare(
    model: Named,
    methods: Annotated[
        Sequence[str],
        Opt("A method with its options, or all. Repeatable.", "--method", "-m", metavar="NAME[:KEY=VALUE,…]"),
    ],
    keep: Annotated[
        Sequence[float | int | str],
        Opt("Routed experts to keep: ratio (0.5, 50%) or count. Repeatable.", "--keep", "-k", kind=str),
    ],
    data: Data,
    eval_data: Annotated[Sequence[str], Opt("Held-out text for evaluation. Repeatable.", "--eval-data", "-e", metavar=SPECS)],
    out: Annotated[
        str | Path,
        Opt("Plans, finished cells, table, picture and page.", "--out", "-o", metavar="FOLDER", kind=Path, writes="into"),
    ],
    *,
    budgets: Annotated[
        Sequence[str],
        Opt(
            "uniform, global, threshold (the methods' own, without --keep), sensitivity or esap (searched on --data). Repeatable.",
            "--budget",
            shown=False,
            metavar="NAME[:KEY=VALUE,…]",
        ),
    ] = ("uniform",),
    heal: Annotated[
        Sequence[str],
        Opt("Also heal every plan on the calibration text. Repeatable.", metavar="NAME[:KEY=VALUE,…]"),
    ] = (),
    progressive: Annotated[
        bool,
        Opt(
            "Also plan every method that reads statistics on progressive ones (see `expertsmith calibrate --progressive`): one calibration for each ratio.",
            "--progressive",
        ),
    ] = False,
    tasks: Tasks = (),
    task_path: TaskPath = (),
    limit: Limit = None,
    overwrite: Annotated[bool, Opt("Replace the comparison of another model.", "--overwrite")] = False,
    **given: Unpack[Calibrating],
) -> dict[str, Any]:
    """Compare many methods and ratios from one calibration: one table, and a picture of quality over size. Random draws are always included.

    Only plans and numbers are written: each plan is evaluated on the loaded model. An interrupted run resumes after the last finished cell.
    Calibration and evaluation are data-parallel: torchrun --nproc-per-node N -m expertsmith compare …

    [dim]expertsmith compare allenai/OLMoE-1B-7B-0924 -m all -k 0.75 -k 0.5 -d c4.jsonl -e heldout.jsonl -o olmoe-methods[/dim]

    Args:
        methods: `NAME[:KEY=VALUE,…]` each, or "all".
        keep: ratios or counts.
        eval_data: held-out text, `[DOMAIN=]SOURCE[:N]` each.
        budgets: "uniform", "global", "threshold" (the methods' own, without keep), "sensitivity" or "esap" (searched on `data`; their options follow, "esap:generations=5").
        heal: ways of healing, `NAME[:KEY=VALUE,…]`, each beside the cell without.

    A cell's plan is in `out/plans` (apply it to get that model). It is evaluated on the loaded original with the plan's experts masked and
    merged, which is what `verify` holds a written checkpoint to. Finished cells are kept, and are not made again for the same model, text,
    method and options. Leaves comparison.json, .html, .svg and .md; returns what comparison.json holds.

    Raises:
        UserError: an unknown method, option, budget or way of healing, a keep that the router cannot work with, no data, a folder with other files.
    """
    from expertsmith.comparison.run import Stages
    from expertsmith.comparison.run import compare as run_comparison

    options = {key: value for key, value in given.items() if key not in ("as_type", "revision")}  # both are in force
    return run_comparison(
        model,
        methods,
        keep,
        data,
        eval_data,
        out,
        stages=Stages(calibrate, plan, apply, heal_model),
        budgets=budgets or ("uniform",),
        heal=heal,
        progressive=progressive,
        tasks=tasks,
        task_path=task_path,
        limit=limit,
        overwrite=overwrite,
        **options,  # type: ignore[arg-type]
    )
