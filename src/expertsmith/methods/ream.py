"""REAM: router-weighted expert activation merging (Jha et al., arXiv 2604.04356)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.errors import UserError
from expertsmith.experts.rules import ranked
from expertsmith.methods.base import Array, Choice, Facts, Positive, method
from expertsmith.methods.merging import merged_choice, refuse_capacity, similarity_of
from expertsmith.methods.reap import reap

ZERO = 0.5  # the largest saliency that the authors give to an expert of saliency 0


@method(
    "ream",
    "Merge the experts that reap would prune into the most salient ones",
    "arXiv 2604.04356",
    gives="choice",
    cost="one calibration pass that runs every expert on every token; one neuron assignment per merged expert",
    limits="Float weights only; merges most of the removed experts into a few of the kept ones, which then resemble no single expert.",
    budgets=("uniform",),
    averages=True,
    all_outputs=True,
)
def ream(statistics: LayerStatistics, facts: Facts, keep_count: int, *, capacity: Positive = 16, align: bool = True) -> Choice:
    """The `keep_count` experts with the highest REAP saliency S are centroids, so the kept ids are those of `reap`. From the most salient
    centroid down, each absorbs the `capacity` - 1 most similar of the other experts that are still free; so a few centroids take all
    of them, and most stay as they are. A merged expert is the average with weights S_j / (sum of S over its group), and has the
    centroid's router row.

    similarity_ij = 1/2 (cos(m_i, m_j) + 1)/2 + 1/2 (1 - D_ij / max D). m_j is the mean over ALL tokens of s_j(x) E_j(x), with
    s_j the full router score and E_j the raw output; D_ij is the Euclidean distance of the experts' router logits over all tokens, each
    column [tokens] scaled to length 1. An S of 0 weighs min(0.5, the layer's smallest positive S).

    capacity: maximum number of experts in a group, including the centroid. align: weight matching re-orders the neurons of
    every member to match the centroid before averaging, as in m_smoe.

    With expert_groups, centroids absorb within their own expert_group only, as many centroids in each. On a tie of S the lower id is
    pruned first, of equal similarities the lower id is absorbed first.

    Deviations from the authors' code: S is REAP's mean of g ||f|| (theirs multiplies by the score twice, and averages batches without
    their sizes, padding included); s_j is the model's own score (theirs is a softmax for sigmoid routers too); neurons are matched by
    weights alone (theirs adds distances of activations, which they take from other random tokens for each expert, and reduces weights to
    64 principal components); a layer sees the outputs of merged layers before it, as in theirs, with `--progressive` only.
    """
    if any("all_scored_output_sum" not in held for held in statistics.domains.values()):
        raise UserError(
            f"layer {facts.layer}: the statistics are of an earlier version, without outputs weighted by router scores",
            "calibrate again with --all-outputs",
        )
    outputs = statistics.total("all_scored_output_sum")
    saliency: Array = reap(statistics, facts)
    finite = np.isfinite(outputs).all(1) & np.isfinite(saliency)
    if not finite.all():
        raise UserError(
            f"layer {facts.layer}: the outputs of expert {int(finite.argmin())} are not finite", "calibrate in another dtype"
        )
    refuse_capacity(facts, keep_count, capacity)
    positive = saliency[saliency > 0]
    weight = np.where(saliency > 0, saliency, min([ZERO, *positive]))
    similarity = (similarity_of(outputs @ outputs.T) + closeness(statistics.total("logit_gram"))) / 2

    def cluster(members: Sequence[int], count: int) -> tuple[list[int], list[int]]:
        ids = list(members)
        order = ranked(saliency[ids].tolist(), range(len(ids)), reap.ties)
        return absorb(order, similarity[np.ix_(ids, ids)], count, capacity)

    def shares(sources: list[int]) -> list[float]:
        return [float(share) for share in weight[sources] / weight[sources].sum()]

    how = {"align": "weights" if align else "none", "router": "dominant", "log_count": False}
    return merged_choice(facts, keep_count, cluster, shares, how, {"saliency": saliency.tolist()})


def closeness(gram: Array) -> Array:
    """1 - D_ij / max D, in [0, 1], D_ij = |u_i - u_j| the distance of unit vectors, from their Gram matrix [E, E] before scaling:
    D^2 = 2 - 2 cos. All ones if no two vectors differ."""
    distance = 2 * np.sqrt(np.maximum(0.0, 1 - similarity_of(gram)))
    largest = float(distance.max())
    result: Array = 1 - distance / largest if largest > 0 else np.ones_like(distance)
    return result


def absorb(order: Sequence[int], similarity: Array, count: int, capacity: int) -> tuple[list[int], list[int]]:
    """(labels, centroid of every label): the first `count` experts of `order` are the centroids. In this order, each takes the capacity - 1
    most similar of the others that are still free; the lower id on a tie."""
    centroids, free = list(order[:count]), sorted(order[count:])
    labels = [-1] * len(order)
    for label, centroid in enumerate(centroids):
        free.sort(key=lambda expert: (-similarity[expert, centroid], expert))
        for expert in [centroid, *free[: capacity - 1]]:
            labels[expert] = label
        free = free[capacity - 1 :]
    return labels, centroids
