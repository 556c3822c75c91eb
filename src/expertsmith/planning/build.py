"""Build a plan: by the method's kind, made even on request, with multi-token prediction, summary and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertsmith.methods.base import Array
from expertsmith.planning.ahead import planned_ahead
from expertsmith.planning.job import Job
from expertsmith.planning.kinds import entries_of
from expertsmith.planning.neurons import with_neurons
from expertsmith.planning.novices import with_novices
from expertsmith.planning.plan import CalibrationData, LayerPlan, Plan, Source
from expertsmith.planning.plan import Method as MethodEntry
from expertsmith.planning.sizes import summary_of

FEW_TOKENS = 30  # below this many tokens a mean over an expert's tokens is noise (frontier card, section 1)


def make_plan(job: Job, router_groups: Any, uniform: bool, options: Mapping[str, Any]) -> Plan:
    """Make the plan of a job. `uniform` replaces counts that differ between layers by the nearest equal ones, and notes what that costs."""
    entries = entries_of(job)
    counts = {layer: len(entry.keep) for layer, entry in entries.items()}
    if uniform and len(set(counts.values())) > 1:
        entries = _even_out(job, entries, counts)
    inventory = job.inventory
    constants: dict[int, Array] = {}
    if job.method.constants:
        entries, constants = with_novices(job, entries)
    ahead = inventory.mtp_layers if job.mtp == "keep" else []
    if ahead:
        entries = {**entries, **planned_ahead(job, ahead, entries, router_groups)}
    _warn(entries, job)
    used = {"budget": job.budget, **({"keep": job.keep} if job.keep is not None else {}), **job.values, **options, **job.found}
    calibration = job.tokens
    if job.statistics:
        calibration = CalibrationData(fingerprint=job.statistics.header["data"]["fingerprint"], tokens=job.statistics.tokens)
    made = Plan(
        method=MethodEntry(name=job.method.name, options=used),
        model=Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint),
        calibration=calibration,
        router_groups=router_groups,
        mtp=job.mtp if inventory.has_mtp else None,
        layers=[entries[layer] for layer in inventory.layers + ahead],
        summary=summary_of(entries.values(), inventory, job.mtp),
        notes=job.notes,
    )
    return with_neurons(job, made.with_constants(constants, "the plan") if constants else made)


def _even_out(job: Job, uneven: Mapping[int, LayerPlan], counts: Mapping[int, int]) -> dict[int, LayerPlan]:
    """Plan again with the same method and total, but one count for all layers; notes what that costs in the method's own measure."""
    total, groups = sum(counts.values()), max(rules.groups for rules in job.rules.values())
    least = max(rules.least for rules in job.rules.values())
    count = max(least, round(total / len(counts) / groups) * groups)
    found = f"{job.budget} kept {min(counts.values())} to {max(counts.values())} experts per layer, {total} in all"
    job.keep, job.budget, job.resume = count, "uniform", True  # the measurements made before are reused
    job.notes.clear()  # those of the discarded plan
    job.found.clear()
    entries = entries_of(job)
    note = f"{found}; uniform keeps {count} in each of {len(counts)}, {count * len(counts)} in all"
    before, after = (_kept_share(plan, job) for plan in (uneven, entries))
    if before is not None and after is not None:
        word = {"saliency": "saliency", "choice": "routed slots of the kept experts"}.get(job.method.gives, "")
        note += f"; share of {word} that is kept, mean over layers: {before:.4f} → {after:.4f}"
    if job.method.gives == "order":
        early = sum(max(0, counts[layer] - count) for layer in counts)
        late = sum(max(0, count - counts[layer]) for layer in counts)
        note += f"; {early} experts are removed that the threshold would keep, {late} are kept that it would remove"
    job.notes.append(note)
    return entries


def _kept_share(entries: Mapping[int, LayerPlan], job: Job) -> float | None:
    shares = []
    for layer, entry in entries.items():
        values: Sequence[float] | Array | None = entry.saliency
        if values is None and job.statistics is not None:
            values = job.statistics.layers[layer].total("selections")
        if values is None:
            return None
        total = float(sum(values))
        shares.append(sum(float(values[e]) for e in entry.keep) / total if total else 1.0)
    return sum(shares) / len(shares)


def _warn(entries: Mapping[int, LayerPlan], job: Job) -> None:
    """Add notes if the calibration was too small for the experts that the plan keeps."""
    used = {layer: entry.why["selections"] for layer, entry in entries.items() if entry.why and "selections" in entry.why}
    unreached = [(layer, e) for layer, counts in used.items() for e in entries[layer].keep if counts[e] == 0]
    if unreached:
        layers = sorted({layer for layer, _ in unreached})
        job.notes.append(
            f"{len(unreached)} kept experts (layers {', '.join(map(str, layers))}) got no calibration token: use more calibration text for this ratio"
        )
    few = [e for layer, counts in used.items() for e in entries[layer].keep if 0 < counts[e] < FEW_TOKENS]
    if few and job.method.averages:
        job.notes.append(
            f"{len(few)} kept experts got fewer than {FEW_TOKENS} tokens, so their mean is noise: use more calibration text"
        )
