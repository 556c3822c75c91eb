"""Plans of methods that give every expert a saliency."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from expertsmith.errors import UserError
from expertsmith.experts.rules import most_salient, over_layers
from expertsmith.methods.base import Array
from expertsmith.planning.budgets import SEARCHED
from expertsmith.planning.job import Job
from expertsmith.planning.plan import LayerPlan
from expertsmith.planning.searching import searched
from expertsmith.ranks import current


def by_saliency(job: Job) -> dict[int, LayerPlan]:
    """Keep each layer's most salient experts, as many as the budget says."""
    saliency = {layer: _finite(job, layer, scores) for layer, scores in _scores(job)}
    assert job.keep is not None

    def best(counts: Mapping[int, int]) -> dict[int, list[int]]:
        return {n: most_salient(saliency[n], count, job.rules[n], job.method.ties) for n, count in counts.items()}

    if job.budget == "uniform":
        kept = best({layer: job.count(layer) for layer in saliency})
    elif job.budget in SEARCHED:
        kept = best(searched(job, best, {layer: len(values) for layer, values in saliency.items()}))
    else:
        kept = over_layers(saliency, job.keep, job.rules, job.method.ties)
    return {
        layer: LayerPlan(
            layer=layer,
            num_experts=job.rules[layer].num_experts,
            keep=kept[layer],
            saliency=saliency[layer],
            why=job.usage(layer),
        )
        for layer in saliency
    }


def _scores(job: Job) -> Iterator[tuple[int, Array]]:
    from expertsmith.experts.weights import expert_weights

    def score(layer: int) -> Array:
        facts = job.facts(layer)
        if job.method.reads == "weights":
            scores: Array = job.method.function(expert_weights(job.inventory, layer), facts, **job.values)
        elif job.method.reads == "nothing":
            scores = job.method.function(facts, **job.values)
        else:
            values = job.method.values_for(job.method.function, job.values)
            scores = job.method.function(job.statistics_of(layer), facts, **values)
        return scores

    with job.progress.task("score", len(job.layers), "layers") as advance:
        for layer, scores in current().over(job.layers, score):
            yield layer, scores
            advance(1)


def _finite(job: Job, layer: int, scores: Array) -> list[float]:
    values = [float(score) for score in scores]
    bad = next((e for e, score in enumerate(values) if not math.isfinite(score)), None)
    if bad is not None:
        raise UserError(
            f"method {job.method.name} gives decoder layer {layer}'s expert {bad} the saliency {values[bad]}",
            "if activations overflowed in the calibration, calibrate with --dtype float32",
        )
    return values
