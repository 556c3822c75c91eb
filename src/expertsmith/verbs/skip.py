"""`skip`: tokens leave out experts of small routing weight."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

from expertsmith.calibration.opening import inventory_of, open_model, token_data
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.work import work_beside
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.verbs.apply import apply
from expertsmith.verbs.definition import FLOW, Opt, verb
from expertsmith.verbs.options import Data, Drawing, EvalData, Model, Opened, Out, Overwrite, PlanGiven, Running, Text, part
from expertsmith.views import show


class Skipping(Text, Running, Opened, total=False):
    """A model that is run on text."""


@verb(
    FLOW,
    show=lambda result, given: show.show_skipping(result),
    plain=lambda result, given: {**result, "plan": result["plan"].to_json()},
)
def skip(
    model: Model,
    data: Data,
    out: Out,
    *,
    plan: Annotated[
        PlanGiven | None,
        Opt("Prune or merge by this plan first; thresholds are calibrated on the result.", "--plan", kind=Path),
    ] = None,
    statistic: Annotated[
        Literal["median", "mean", "quantile"],
        Opt("The threshold is the median (the paper), mean or quantile of the calibration tokens' values."),
    ] = "median",
    quantile: Annotated[
        float | None, Opt("With --statistic quantile: which one, 0 to 1. Higher skips more.", shown=False)
    ] = None,
    active: Annotated[
        float | None, Opt("Instead of --statistic: the target mean number of experts per token (top_k > 2).", shown=False)
    ] = None,
    eval_data: EvalData = (),
    measure: Annotated[bool, Opt("Measure quality and speed at the end.", "--measure/--no-measure")] = True,
    overwrite: Overwrite = False,
    **given: Unpack[Skipping],
) -> dict[str, Any]:
    """Dynamic skipping: a token skips experts with a small routing weight. The thresholds are written into the checkpoint.

    `expertsmith.load(OUT)` and `evaluate` run it with skipping; other engines load OUT and skip nothing.

    [dim]expertsmith skip mistralai/Mixtral-8x7B-v0.1 -d c4.jsonl --plan plan.json -o mixtral-skip[/dim]

    Args:
        plan: prune or merge first, and calibrate the thresholds on the result; otherwise all experts stay.
        statistic: what the threshold is of the values on the calibration tokens: "median" (the paper), "mean", or a `quantile`. With top_k = 2
            the rule is the paper's: the second expert is skipped where w_2 < threshold * w_1. With more it is the tail rule of its appendix
            A.2: the smallest number of experts stays whose left-out weights are at most threshold of all (`engine.skipping`).
        active: instead, the wanted mean number of experts a token runs (top_k > 2).
        eval_data: held-out text for the quality with and without skipping; none: the calibration text.
        measure: False leaves quality and speed out.

    Raises:
        UserError: a model with one expert a token, or whose router scales the experts' inputs; see also `apply`.
    """
    from expertsmith.calibration.ratios import collect_ratios, thresholds
    from expertsmith.checkpoint.writer import prepare_target, swap
    from expertsmith.engine.loading import transformers_config
    from expertsmith.engine.skipping import check_rule
    from expertsmith.evaluation.skipping import with_and_without
    from expertsmith.planning.plan import load_plan
    from expertsmith.surgery import skip as surgery
    from expertsmith.surgery.mask import in_force

    if (quantile is not None) != (statistic == "quantile"):
        raise UserError(
            f"--statistic is {statistic}" + (f", but --quantile {quantile:g} was given" if quantile is not None else ""),
            "pass both --statistic quantile and --quantile 0.7, or neither",
        )
    progress = given["progress"]
    target = Path(out)
    inventory = inventory_of(model, given["allow_pickle"])
    source = inventory.checkpoint
    prepare_target(target, source.path, overwrite)
    run = part(Running, given)
    rule = surgery.rule_for(inventory)
    check_rule(transformers_config(source), inventory.architecture, rule)
    made = surgery.keep_all(inventory) if plan is None else load_plan(plan)
    if made.novices or made.neurons:
        what = "novices" if made.novices else "neurons"
        raise UserError(f"a plan with {what} cannot have skip thresholds", "give a plan that removes or merges experts")
    tokens = token_data(source.path, source.config, data, progress, **part(Text, given))
    texts = list(eval_data) or list(data)
    shape = part(Drawing, given)
    held_out = None
    if measure:
        held_out = token_data(source.path, source.config, texts, progress, overlap=1, pack=True, overlong="truncate", **shape)
    with ExitStack() as stack:
        if plan is not None:  # nothing stands under the name of the output before its thresholds are known
            pruned = stack.enter_context(work_beside(target, "pruned", scratch=True))
            notes = apply(inventory, made, pruned, progress=progress)
        loaded = open_model(inventory if plan is None else take_inventory(open_checkpoint(pruned)), progress, **run)
        found = thresholds(
            collect_ratios(loaded, tokens, batch_tokens=loaded.batch_tokens(given["batch_tokens"]), progress=progress),
            rule,
            statistic=statistic,
            quantile=0.5 if quantile is None else quantile,
            active=active,
        )
        word = (
            f"{active:g} active experts"
            if active is not None
            else f"quantile {quantile:g}"
            if statistic == "quantile"
            else statistic
        )
        made = surgery.with_thresholds(made, found, rule, word, tokens)
        if plan is None:
            apply(inventory, made, target, overwrite=overwrite, progress=progress)
        else:
            surgery.refresh(pruned, made, inventory, notes)
            swap(pruned, target)
    result: dict[str, Any] = {"out": str(target), "plan": made, "rule": rule, "quality": None, "speed": None}
    if held_out is not None:
        written = take_inventory(open_checkpoint(target))
        models = [open_model(written, progress, **run) for _ in range(2)]
        result |= with_and_without(models[0], models[1], in_force, held_out.batches(4096), progress)
        result["quality"]["held_out"] = bool(eval_data)
    return result
