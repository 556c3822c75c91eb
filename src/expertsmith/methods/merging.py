"""Methods that merge experts: HC-SMoE (Chen et al., arXiv 2410.08589, ICML 2025) and M-SMoE (Li et al., arXiv 2310.01334, ICLR 2024).

Usage f_i = selections of expert i / selections of all experts of the layer. Both methods merge only within the router's expert_groups, with
the same number of clusters in each, so group-limited routing still works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist, pdist, squareform

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.errors import UserError
from expertsmith.experts.rules import groups_of
from expertsmith.methods.base import Array, Choice, Facts, Natural, method

Linkage = Literal["average", "single", "complete", "ward"]
Weights = Literal["frequency", "average", "authors"]
Router = Literal["dominant", "mean"]
Step = tuple[int, int, float]  # two cluster labels (the first is kept) and the distance at which they are joined
EPSILON = 1e-7
ROUNDING = 1e-9  # relative: distances this close to the smallest count as equal
LLOYD_STEPS = 300


@method(
    "hc_smoe",
    "Merge experts with similar mean outputs, by hierarchical clustering",
    "arXiv 2410.08589 (ICML 2025)",
    gives="choice",
    cost="one calibration pass that runs every expert on every token",
    limits="Float weights only; the same number of clusters in every layer",
    budgets=("uniform",),
    all_outputs=True,
)
def hc_smoe(
    statistics: LayerStatistics,
    facts: Facts,
    keep_count: int,
    *,
    linkage: Linkage = "average",
    clustering: Literal["hierarchical", "kmeans"] = "hierarchical",
    align: bool = False,
    weights: Weights = "frequency",
    router: Router = "dominant",
    log_count: bool = False,
    seed: Natural = 0,
) -> Choice:
    """Cluster the experts by the Euclidean distance of o_i = mean over ALL tokens x of E_i(x) (raw outputs, routed or not) into
    `keep_count` clusters. A merged expert gets the id and router row of the centre: the member nearest to the mean of the cluster's o_i.

    linkage: "average" (the paper's), "single", "complete" or "ward". weights: "frequency" f_i / sum f, "authors" f_i / (sum f + 1e-7),
    "average" 1 / |c|; a cluster without tokens uses the plain mean. clustering "kmeans" starts from k-means++ with `seed`.
    align: first re-order the neurons of every member to match the centre, as in m_smoe. This is our extension; without it, averaging
    destroys experts without a common origin. router: the centre's row, or the mean of the members' rows with the same weights; log_count
    adds ln |c| to the router's logit bias.

    Deviations from the authors' code: complete and ward linkage are the standard ones (theirs join the farthest clusters first, and their
    ward does not square); usage counts the model's own top_k (theirs always 2); unused clusters are not zeroed; their run scripts
    misspell the option and so run k-means.
    """
    outputs = statistics.total("all_output_sum") / float(statistics.total("tokens").item())
    if not np.isfinite(outputs).all():
        bad = int(np.flatnonzero(~np.isfinite(outputs).all(1))[0])
        raise UserError(f"layer {facts.layer}: the outputs of expert {bad} are not finite", "calibrate in another dtype")
    use = usage(statistics)
    heights: list[list[float]] = []

    def cluster(members: Sequence[int], count: int) -> tuple[list[int], list[int]]:
        features = outputs[list(members)]
        if clustering == "kmeans":
            labels = k_means(features, count, seed)
        else:
            steps = agglomerate(features, linkage)
            heights.append([height for _, _, height in steps])
            labels = cut(steps, len(members), count)
        return labels, [_centre(features, labels, label) for label in range(count)]

    why = {"usage": use.tolist(), "clustering": linkage if clustering == "hierarchical" else clustering, "heights": heights}
    how = {"align": "weights" if align else "none", "router": router, "log_count": log_count}
    return merged_choice(facts, keep_count, cluster, lambda sources: shares(use[sources], weights), how, why)


def m_smoe_allot(statistics: Mapping[int, LayerStatistics], average: float) -> dict[int, int]:
    """`m_smoe_budget` from every layer's statistics."""
    return m_smoe_budget({layer: usage(entry) for layer, entry in statistics.items()}, average)


@method(
    "m_smoe",
    "Merge rarely used experts into frequently used ones with similar router logits",
    "arXiv 2310.01334 (ICLR 2024)",
    gives="choice",
    cost="one calibration pass; one neuron assignment per merged expert",
    limits="Float weights only; near chance with half of the experts unless trained afterwards",
    budgets=("uniform", "global"),
    allot=m_smoe_allot,
)
def m_smoe(
    statistics: LayerStatistics,
    facts: Facts,
    keep_count: int,
    *,
    align: bool = True,
    weights: Weights = "frequency",
    router: Router = "dominant",
    log_count: bool = False,
    capacity: Natural = 0,
) -> Choice:
    """The `keep_count` most used experts are dominant. Every other expert i, in descending usage, joins the dominant expert d with the
    largest s_id = (cos(R[:, i], R[:, d]) + 1) / 2. R are the raw router logits [tokens, experts]. On a tie the most used dominant expert
    wins; among equal usages, the lower id.

    align: weight matching re-orders the neurons of every source to match the dominant expert before averaging. weights: "frequency"
    f_i / sum f, "authors" f_i / (sum f + 1e-7), "average" 1 / |c|; a cluster without tokens uses the plain mean. capacity: maximum
    number of experts in a cluster, including the dominant one; 0 means no limit. router, log_count: as in hc_smoe.

    Deviations from the authors' code: alignment is to the cluster's dominant expert and supports gated experts (theirs aligns all experts
    to expert 0, and only two-matrix experts); router rows are removed with their experts (theirs keeps all rows and shares modules);
    there is no training afterwards. The global budget is `m_smoe_budget`.
    """
    use = usage(statistics)
    similarity = similarity_of(statistics.total("logit_gram"))
    refuse_capacity(facts, keep_count, capacity)

    def cluster(members: Sequence[int], count: int) -> tuple[list[int], list[int]]:
        ids = list(members)
        return join_dominants(use[ids], similarity[np.ix_(ids, ids)], count, capacity)

    how = {"align": "weights" if align else "none", "router": router, "log_count": log_count}
    return merged_choice(
        facts, keep_count, cluster, lambda sources: shares(use[sources], weights), how, {"usage": use.tolist()}
    )


def m_smoe_budget(usages: Mapping[int, Array], average: float) -> dict[int, int]:
    """The number of clusters of every layer, `average` per layer: one ranking of usages over all layers (method card of M-SMoE, B 1-3).

    Every layer's largest usage is set to 1, so that each keeps a cluster. With N = average * layers (rounded down), the threshold is the
    (N + 1)-th largest value. A layer has as many clusters as values strictly above the threshold, so ties at it lower the total.
    Layers that are not merged are left out: their values would all be 1 and change nothing. average = experts merges nothing (the
    authors' code merges the least used one).

    Raises:
        UserError: fewer than one cluster per layer, or more clusters than experts.
    """
    experts = sum(len(values) for values in usages.values())
    total = int(np.floor(average * len(usages) + ROUNDING))
    if total > experts:
        raise UserError(
            f"{average} clusters per layer are more than the number of experts ({experts / len(usages):g} per layer)"
        )
    if total == experts:
        return {layer: len(values) for layer, values in usages.items()}
    raised = {}
    for layer, values in usages.items():
        raised[layer] = np.array(values, dtype=np.float64)
        raised[layer][int(np.argmax(values))] = 1.0
    threshold = np.sort(np.concatenate(list(raised.values())))[::-1][total]
    if threshold >= 1:
        raise UserError(
            f"{average} clusters per layer leave some of the {len(usages)} layers without any",
            "keep at least one expert per layer",
        )
    return {layer: int((values > threshold).sum()) for layer, values in raised.items()}


def usage(statistics: LayerStatistics) -> Array:
    """f_i: the share of expert i in the layer's (token, slot) selections; zeros if nothing was selected."""
    selections = statistics.total("selections").astype(np.float64)
    return selections / max(1.0, float(selections.sum()))


def similarity_of(gram: Array) -> Array:
    """s_ij = (cos + 1) / 2 in [0, 1] from the Gram matrix [E, E] of the experts' vectors (of router logits: summed over tokens); norms are
    at least 1e-7, s_ii = 1."""
    norms = np.maximum(np.sqrt(np.diagonal(gram)), EPSILON)
    similarity: Array = (gram / np.outer(norms, norms) + 1) / 2
    np.fill_diagonal(similarity, 1.0)
    return similarity


def join_dominants(use: Array, similarity: Array, count: int, capacity: int = 0) -> tuple[list[int], list[int]]:
    """(labels, dominant expert of every label): labels are numbered in descending usage of the dominants."""
    order = np.argsort(-use, kind="stable")
    dominants = [int(expert) for expert in order[:count]]
    labels = [-1] * len(use)
    sizes = [1] * count
    for label, expert in enumerate(dominants):
        labels[expert] = label
    for expert in order[count:]:
        candidates = [label for label in range(count) if not capacity or sizes[label] < capacity]
        label = max(candidates, key=lambda c: similarity[expert, dominants[c]])  # the first on a tie
        labels[int(expert)] = label
        sizes[label] += 1
    return labels, dominants


def agglomerate(features: Array, linkage: Linkage) -> list[Step]:
    """Join single experts step by step into one cluster, always the two closest clusters (Euclidean; Lance-Williams updates). A tie goes to
    the first pair in row-major order of labels, as in the paper's code; a joined cluster keeps the smaller label. Without ties the result
    is scipy's linkage."""
    count = len(features)
    distance = squareform(pdist(features)) if count > 1 else np.zeros((1, 1))
    np.fill_diagonal(distance, np.inf)
    sizes = np.ones(count)
    steps: list[Step] = []
    for _ in range(count - 1):
        i, j = divmod(int(distance.argmin()), count)
        height = float(distance[i, j])
        a, b = distance[i], distance[j]
        if linkage == "average":
            row = (sizes[i] * a + sizes[j] * b) / (sizes[i] + sizes[j])
        elif linkage == "ward":
            squares = (sizes[i] + sizes) * a**2 + (sizes[j] + sizes) * b**2 - sizes * height**2
            row = np.sqrt(np.maximum(squares / (sizes[i] + sizes[j] + sizes), 0))
        else:
            row = np.minimum(a, b) if linkage == "single" else np.maximum(a, b)
        row[[i, j]] = np.inf
        distance[i], distance[:, i] = row, row
        distance[j], distance[:, j] = np.inf, np.inf
        sizes[i] += sizes[j]
        steps.append((i, j, height))
    return steps


def cut(steps: Sequence[Step], total: int, count: int) -> list[int]:
    """Labels of `total` points after the steps that leave `count` clusters, numbered by first appearance."""
    owner = list(range(total))
    for i, j, _ in steps[: total - count]:
        owner = [i if label == j else label for label in owner]
    return by_appearance(owner)


def by_appearance(labels: Sequence[int]) -> list[int]:
    """The same partition with labels 0, 1, … in the order in which they first appear."""
    first: dict[int, int] = {}
    return [first.setdefault(label, len(first)) for label in labels]


def k_means(features: Array, count: int, seed: int) -> list[int]:
    """Labels of Lloyd's k-means from a seeded k-means++ start. A cluster without points gets the point farthest from its centre, among
    points in clusters of two or more."""
    random = np.random.default_rng(seed)
    chosen = [int(random.integers(len(features)))]
    squares = np.full(len(features), np.inf)  # to the nearest chosen point
    while len(chosen) < count:
        squares = np.minimum(squares, cdist(features, features[chosen[-1:]])[:, 0] ** 2)
        total = squares.sum()
        left = [point for point in range(len(features)) if point not in chosen]
        chosen.append(int(random.choice(len(features), p=squares / total)) if total > 0 else left[0])
    centres = features[chosen].astype(np.float64)
    labels = np.full(len(features), -1)
    for _ in range(LLOYD_STEPS):
        distance = cdist(features, centres)
        nearest = distance.argmin(1)
        for label in range(count):
            sizes = np.bincount(nearest, minlength=count)
            if not sizes[label]:
                own = np.where(sizes[nearest] > 1, distance[np.arange(len(nearest)), nearest], -1.0)
                nearest[int(own.argmax())] = label
        if (nearest == labels).all():
            break
        labels = nearest
        centres = np.stack([features[labels == label].mean(0) for label in range(count)])
    return by_appearance(labels.tolist())


def shares(use: Array, how: Weights) -> list[float]:
    """Weights of a cluster's members from their usages."""
    total = float(use.sum())
    if how == "average" or total == 0:
        return [1.0 / len(use)] * len(use)
    return [float(f) for f in use / (total + (EPSILON if how == "authors" else 0.0))]


def _centre(features: Array, labels: Sequence[int], label: int) -> int:
    """The member nearest to the mean of its cluster; the lowest id on a tie. A cluster of two is always a tie, up to rounding."""
    members = [point for point, own in enumerate(labels) if own == label]
    distance = np.linalg.norm(features[members] - features[members].mean(0), axis=1)
    return members[int(np.flatnonzero(distance <= distance.min() * (1 + ROUNDING))[0])]


def refuse_capacity(facts: Facts, keep_count: int, capacity: int) -> None:
    """Refuse clusters (0: of any size) that cannot contain all experts.

    Raises:
        UserError: fewer places than experts.
    """
    if capacity and 0 < capacity * keep_count < facts.num_experts:
        raise UserError(
            f"layer {facts.layer}: {keep_count} clusters of at most {capacity} cannot contain {facts.num_experts} experts",
            f"use -O capacity={-(-facts.num_experts // keep_count)} or more, or 0 for no limit",
        )


def merged_choice(
    facts: Facts,
    keep_count: int,
    cluster: Callable[[Sequence[int], int], tuple[list[int], list[int]]],
    weights: Callable[[list[int]], list[float]],
    how: Mapping[str, object],
    why: Mapping[str, object],
) -> Choice:
    """Cluster every expert_group separately. `cluster` returns labels, and for each label the index in `members` of its centre; `weights`
    returns the shares of a cluster's members; `how` are further fields of every merge in the plan.

    Raises:
        UserError: a number of clusters that the layer or its expert_groups cannot have.
    """
    groups = groups_of(facts.rules)
    if not 1 <= keep_count <= facts.num_experts:
        raise UserError(
            f"layer {facts.layer}: {keep_count} clusters requested, but there are {facts.num_experts} experts",
            f"keep between 1 and {facts.num_experts}",
        )
    if keep_count % len(groups):
        raise UserError(
            f"layer {facts.layer}: {keep_count} clusters cannot be distributed evenly over {len(groups)} expert_groups",
            f"keep a multiple of {len(groups)}, or plan with --router-groups flatten",
        )
    if keep_count == facts.num_experts:
        return Choice(list(range(keep_count)), [], {"labels": list(range(keep_count)), **why})
    keep, merge, labels = [], [], [0] * facts.num_experts
    for number, members in enumerate(groups):
        own, centres = cluster(members, keep_count // len(groups))
        for place, label in enumerate(own):
            labels[members[place]] = label + number * len(centres)
        for label, centre in enumerate(centres):
            into = members[centre]
            keep.append(into)
            sources = [members[place] for place, mine in enumerate(own) if mine == label]
            if len(sources) > 1:
                merge.append({"into": into, "from": sources, "weights": weights(sources), **how})
    return Choice(sorted(keep), sorted(merge, key=lambda entry: entry["into"]), {"labels": labels, **why})
