"""Plans of methods that give every neuron of an expert a saliency: all experts stay, with fewer neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.weights import Projections
from expertsmith.methods.base import Array
from expertsmith.planning.job import Job
from expertsmith.planning.plan import LayerPlan, Neurons, Plan, digest_ids
from expertsmith.ranks import current

UNKNOWN = -1.0  # the saliency of the neurons of an expert without tokens


def by_neurons(job: Job) -> dict[int, LayerPlan]:
    """Keep each expert's most salient neurons, as many as the method's `cut` says; which ones is in `job.neurons`."""
    method, saliency = job.method, dict[int, Array]()
    assert method.cut is not None
    assert isinstance(job.keep, float | int)
    values = method.values_for(method.function, job.values)

    def score(layer: int) -> Array:
        found: Array = method.function(job.statistics_of(layer), job.facts(layer), **values)
        if not np.isfinite(found).all():
            raise UserError(
                f"method {method.name} gives neurons of decoder layer {layer} a saliency that is not finite",
                "if activations overflowed in the calibration, calibrate with --dtype float32",
            )
        return found

    with job.progress.task("score", len(job.layers), "layers") as advance:
        for layer, found in current().over(job.layers, score):
            saliency[layer] = found
            advance(1)
    counts = method.cut(saliency, float(job.keep), **method.values_for(method.cut, job.values))
    return {layer: _entry(job, layer, saliency[layer], counts[layer]) for layer in job.layers}


def _entry(job: Job, layer: int, saliency: Array, counts: Sequence[int]) -> LayerPlan:
    experts, width = saliency.shape
    unknown = [expert for expert in range(experts) if (saliency[expert] == UNKNOWN).all()]
    if unknown:
        sizes = sizes_of(job.inventory, layer)
        saliency = np.array(saliency)
        saliency[unknown] = sizes[unknown]
        job.notes.append(
            f"decoder layer {layer}: {len(unknown)} experts got no calibration token, so their neurons were chosen by their weights"
        )
    why = {"kept_saliency": kept_share(saliency, counts), **(job.usage(layer) or {})}
    entry = LayerPlan(layer=layer, num_experts=experts, keep=list(range(experts)), why=why)
    return with_ids(job.neurons, entry, saliency, counts) if min(counts) < width else entry


def with_ids(into: dict[int, Array], entry: LayerPlan, saliency: Array, counts: Sequence[int]) -> LayerPlan:
    """An entry that keeps the `counts[j]` most salient neurons of every expert j (on a tie the lower); their numbers go to `into`."""
    ids = [np.sort(np.argsort(-row, kind="stable")[:count]) for row, count in zip(saliency, counts, strict=True)]
    into[entry.layer] = np.concatenate(ids).astype("<i4")
    held = Neurons(width=saliency.shape[1], counts=list(counts), sha256=digest_ids(into[entry.layer]))
    return entry.model_copy(update={"neurons": held})


def kept_share(saliency: Array, counts: Sequence[int]) -> float:
    """The share of the saliency of a layer's neurons that stays."""
    total = float(saliency.sum())
    kept = sum(float(np.sort(row)[::-1][:count].sum()) for row, count in zip(saliency, counts, strict=True))
    return kept / total if total > 0 else 1.0


def sizes_of(inventory: Inventory, layer: int) -> Array:
    """[experts, neurons]: the product of the norms of a neuron's rows of gate and up and of its column of down, a measure of its weights alone."""
    held = Projections(inventory, layer)
    found: Array | float = 1.0
    for role in held.roles:
        axis = 0 if role == "down" else 1
        found = found * np.stack([np.linalg.norm(matrix.astype(np.float64), axis=axis) for matrix in held.of(role)])
    assert isinstance(found, np.ndarray)
    return found


def neurons_ahead(job: Job, layers: Sequence[int], made: Mapping[int, LayerPlan]) -> dict[int, LayerPlan]:
    """The entries of multi-token-prediction layers, which no gradient of the loss reaches: with one width for the whole model their experts
    have it too, and their neurons are chosen by their weights; otherwise they stay."""
    widths = {count for entry in made.values() for count in (entry.neurons.counts if entry.neurons else ())}
    alike = len(widths) == 1 and all(entry.neurons for entry in made.values()) and job.values.get("width") == "model"
    entries = {}
    for layer in layers:
        experts = job.inventory.experts_in(layer)
        entry = LayerPlan(layer=layer, num_experts=experts, keep=list(range(experts)))
        if alike:
            entry = with_ids(job.neurons, entry, sizes_of(job.inventory, layer), [next(iter(widths))] * experts)
        entries[layer] = entry
    if alike and layers:
        job.notes.append(
            "neurons of multi-token prediction were chosen by their weights alone: no gradient of the loss reaches them"
        )
    return entries


def with_neurons(job: Job, made: Plan) -> Plan:
    """The plan with the numbers of its neurons."""
    return made.with_neurons(job.neurons, "the plan") if made.neurons else made
