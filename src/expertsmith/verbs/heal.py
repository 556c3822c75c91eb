"""`heal`: recover a compressed model towards its original."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Unpack

from expertsmith.calibration.opening import inventory_of, token_data
from expertsmith.checkpoint import open_checkpoint
from expertsmith.ranks import current
from expertsmith.verbs.definition import FLOW, Opt, out_and, verb
from expertsmith.verbs.evaluate import evaluate
from expertsmith.verbs.options import (
    Data,
    Drawing,
    Dtype,
    EvalData,
    Opened,
    Options,
    Overwrite,
    Placing,
    Push,
    Requantise,
    Resume,
    Text,
    Track,
    part,
)
from expertsmith.views import show
from expertsmith.views.tracking import tracked


class Healing(Text, Placing, Opened, total=False):
    """Text, and where the two models are."""


@verb(FLOW, show=lambda report, given: show.show_healing(report), keeps=out_and("work"), ranks=True)
def heal(
    model: Annotated[str | Path, Opt("The compressed checkpoint.", argument=True, metavar="OUT", kind=str)],
    teacher: Annotated[str | Path, Opt("The original model.", "--teacher", "-t", kind=str)],
    data: Data,
    out: Annotated[
        str | Path, Opt("Output folder for the healed checkpoint.", "--out", "-o", metavar="OUT2", kind=Path, writes="folder")
    ],
    *,
    method: Annotated[str, Opt("least_squares, layer_local, router or lora.", "--method", "-m")] = "least_squares",
    options: Options = None,
    requantise: Requantise = False,
    eval_data: EvalData = (),
    dtype: Dtype = "float32",
    resume: Resume = True,
    overwrite: Overwrite = False,
    push: Push = None,
    track: Track = None,
    **given: Unpack[Healing],
) -> dict[str, Any]:
    """Recover the quality of a compressed model. Changes that are worse on held-out tokens are rejected.

    least_squares: down projections in closed form, layer by layer, resident or streamed. layer_local: the same, then router, gate, up and down
    projections by gradients within each layer, as many steps of as many tokens as suit its weights; it says what it chose. router: router rows by distillation. lora: merged adapters (needs peft).

    [dim]expertsmith heal mixtral-half --teacher mistralai/Mixtral-8x7B-v0.1 -m layer_local -d c4.jsonl -o mixtral-half-healed[/dim]

    Returns the report, which is also in `OUT/expertsmith/heal.json`. Finished layers are in OUT2.work until the end, so that an
    interrupted run resumes from there. Data-parallel, for least_squares and layer_local: torchrun --nproc-per-node N -m expertsmith heal …

    Args:
        model: a pruned, merged or converted checkpoint.
        teacher: the original, or the dense model that a converted one was made of.
        options: of the method, see `healing.options`.
        requantise: write healed weights of a quantised model in its own format, and measure what that costs; otherwise all weights are
            written in bfloat16.
        eval_data: further held-out text, on which the model is measured before and after.

    Raises:
        UserError: a teacher that is not the model which the plan inside `model` was applied to, or does not fit, too little data, or an unknown method or option.
    """
    from expertsmith.checkpoint.hub import check_push
    from expertsmith.checkpoint.hub import push as upload
    from expertsmith.healing.options import parse_healer
    from expertsmith.healing.run import Healing as Job
    from expertsmith.healing.run import check_start
    from expertsmith.healing.run import heal as run_healing

    progress = given["progress"]
    chosen = parse_healer(method, options or {})
    inventory = inventory_of(model, given["allow_pickle"], novices=True)
    source = inventory.checkpoint
    original = open_checkpoint(teacher, allow_pickle=given["allow_pickle"])
    check_start(source, original, Path(out), overwrite)
    if push is not None:
        check_push(push, overwrite)
    tokens = token_data(source.path, source.config, data, progress, **part(Text, given))
    run: dict[str, Any] = {**part(Placing, given), "dtype": dtype}
    job = Job(
        inventory,
        original,
        tokens,
        method,
        chosen,
        Path(out),
        given["batch_tokens"] or Job.batch_tokens,
        requantise=requantise,
        resume=resume,
        overwrite=overwrite,
        **run,
    )
    settings = {"verb": "heal", "model": str(model), "teacher": str(teacher), "method": method, **asdict(chosen)}
    with tracked(progress, track if current().first else None, settings) as told:
        report = run_healing(job, told)
    if eval_data:
        asked = {**part(Drawing, given), **part(Opened, given), **run}
        report["quality"] = {
            name: evaluate(path, eval_data, reference=teacher, **asked).to_json()
            for name, path in (("before", model), ("after", out))
        }
    where = {} if push is None else {"pushed": current().leading(lambda: upload(Path(out), push))}
    return {"out": str(out), **report, **where}
