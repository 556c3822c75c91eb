"""`analyze`: what the experts do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from expertsmith.calibration.opening import inventory_of
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.output import refuse_other_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.verbs.calibrate import calibrate
from expertsmith.verbs.definition import LOOK, Opt, out_and, verb
from expertsmith.verbs.options import Calibrating, Data, Into, Model, PlanGiven, Stats
from expertsmith.verbs.plan import model_and_tokens

if TYPE_CHECKING:
    from expertsmith.planning.plan import Plan


def _show(measures: Any, given: Mapping[str, Any]) -> None:
    from expertsmith.views.analysis_table import show_measures

    show_measures(measures, Path(given["out"]))


@verb(LOOK, show=_show, keeps=out_and(""))
def analyze(  # noqa: C901  (what does not go together is refused in one place)
    model: Model,
    out: Into,
    *,
    data: Data = (),
    stats: Stats = None,
    all_experts: Annotated[
        int,
        Opt(
            "Also run every expert on this many sampled tokens per domain: compares outputs and tests whether the router prefers large ones.",
            "--all-experts",
            least=0,
            metavar="TOKENS",
        ),
    ] = 0,
    dense: Annotated[
        str | Path | None,
        Opt("A dense model of the same hidden size to compare the experts with.", kind=str, shown=False),
    ] = None,
    reference: Annotated[
        str | Path | None,
        Opt("MODEL was made from this one: also show what was removed and how routing moved.", "--reference", "-r", kind=str),
    ] = None,
    plan: Annotated[
        PlanGiven | None,
        Opt("With --reference: the plan that was applied; default: the one inside MODEL.", "--plan", kind=Path),
    ] = None,
    reference_stats: Annotated[
        Any, Opt("With --reference: its statistics on the same text, instead of calibrating it.", kind=Path)
    ] = None,
    neurons: Annotated[int, Opt("Neurons per expert that neuron matching samples.", least=2)] = 128,
    pairs: Annotated[int, Opt("Expert pairs per layer that neuron matching samples.", least=1)] = 32,
    overwrite: Annotated[bool, Opt("Replace the analysis of another model.", "--overwrite")] = False,
    **given: Unpack[Calibrating],
) -> dict[str, Any]:
    """Show what the experts do, as numbers (OUT/measures.json) and as one HTML page (OUT/report.html).

    From the weights alone; with --data also which experts each domain uses and the expected loss of pruning.

    [dim]expertsmith analyze Qwen/Qwen1.5-MoE-A2.7B -d code=code.jsonl -d math=math.jsonl --all-experts 512 -o look[/dim]

    Args:
        all_experts: also run every expert on this many sampled tokens a domain of `data`: compares outputs, tests observation 2.
        dense: a dense model of the same hidden size, whose FFNs the experts are compared with.
        reference: `model` was made of this one: also what went, and how routing moved (with `data`, both are calibrated).
        plan: the plan that did it; None: the one inside `model`.
        reference_stats: statistics of `reference` on the same text, instead of calibrating it.
        overwrite: replace the analysis of another model, or of other text; otherwise it is refused.
        neurons, pairs: neurons an expert, and expert pairs a layer, that neuron matching samples.

    Raises:
        UserError: a dense model, experts that cannot be compared, statistics or a plan of other models, NaN in a weight. Nothing is written then.
    """
    from expertsmith.analysis import folder, study
    from expertsmith.analysis.sources import dense_model
    from expertsmith.analysis.static import Sampling
    from expertsmith.calibration.all_experts import sample_layers
    from expertsmith.calibration.data import load_tokenizer
    from expertsmith.calibration.spec import refuse_missing
    from expertsmith.engine.devices import choose_device
    from expertsmith.planning.given import matching_statistics

    progress, target = given["progress"], Path(out)
    folder.prepare(target)
    refuse_missing(data)
    inventory = inventory_of(model, given["allow_pickle"])
    refuse_other_model(target / folder.MEASURES, "analysis", inventory.checkpoint.fingerprint, overwrite)
    study.refuse_single(inventory)
    where = str(choose_device(given["device"]))
    material = study.Material(inventory, Sampling(neurons, pairs, given["seed"]), device=where, progress=progress)
    if all_experts and not data:
        raise UserError("--all-experts runs the model on text", "pass --data FILE")
    if reference is None and (plan is not None or reference_stats is not None):
        raise UserError("--reference-plan or --reference-stats given without --reference", "pass --reference MODEL")
    if dense is not None:
        hidden = int(inventory.config.get("hidden_size") or inventory.config.get("d_model") or 0)
        material.dense = dense_model(open_checkpoint(dense, allow_pickle=given["allow_pickle"]), hidden)
    base = None
    if reference is not None:
        base = take_inventory(open_checkpoint(reference, allow_pickle=given["allow_pickle"]))
        material.plan, material.reference_name = _cut(inventory, base, plan, str(reference)), str(reference)
        if reference_stats is not None:
            material.reference = matching_statistics(base, reference_stats)
    if stats is not None:
        material.statistics = matching_statistics(inventory, stats)
    if data and stats is None:
        material.statistics = matching_statistics(
            inventory, calibrate(model, data, target / "stats", overwrite=overwrite, **given)
        )
    if data and base is not None and reference_stats is None:
        material.reference = matching_statistics(
            base, calibrate(base.checkpoint.source, data, target / "reference.stats", overwrite=overwrite, **given)
        )
    texts = {part.header["data"]["fingerprint"] for part in (material.statistics, material.reference) if part is not None}
    if len(texts) > 1:
        raise UserError(
            "the statistics of the reference are from other text, so routing cannot be compared",
            "calibrate both on the same data with the same options, or pass --data and neither --stats nor --reference-stats",
        )
    if all_experts:
        loaded, tokens = model_and_tokens(inventory, data, given)
        tokenizer = load_tokenizer(inventory.checkpoint.path)
        material.decode = None if tokenizer is None else lambda token: str(tokenizer.decode([token]))
        material.samples = sample_layers(
            loaded,
            tokens,
            rules={layer: inventory.rules_of(layer) for layer in inventory.layers},
            max_tokens=all_experts,
            batch_tokens=loaded.batch_tokens(given["batch_tokens"]),
            seed=given["seed"],
            progress=progress,
        )
    measures: dict[str, Any] = study.plain(study.study(material))
    folder.write(target, measures)
    return measures


def _cut(inventory: Inventory, base: Inventory, plan: PlanGiven | None, reference: str) -> Plan:
    """The plan that made the one model of the other, for decoder layers.

    Raises:
        UserError: a plan of another model, or one that does not lead to these counts.
    """
    from expertsmith.analysis.cutting import check_plan
    from expertsmith.planning.plan import load_plan

    made = load_plan(plan if plan is not None else inventory.checkpoint.path / "expertsmith" / "plan.json")
    if made.model.fingerprint != base.checkpoint.fingerprint:
        raise UserError(
            f"the plan was made for another model than {reference}", "pass the original model of this plan as --reference"
        )
    made = made.of_decoder_layers()
    check_plan(made, reference, base.counts, inventory.counts, inventory.checkpoint.source)
    return made
