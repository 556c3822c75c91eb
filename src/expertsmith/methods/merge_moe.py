"""MergeMoE: merging as a change of expert outputs (Miao et al., arXiv 2510.14436)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.errors import UserError
from expertsmith.methods.base import Array, Choice, Facts, Projections, method
from expertsmith.methods.merging import join_dominants, merged_choice, shares, similarity_of, usage

AT_ONCE = 2**31  # bytes of matrices that are compared with the others in one read of the layer
UNSOLVED = (
    "the plan averages down projections; MergeMoE solves them by least squares: heal the checkpoint with --method least_squares, "
    "or compress with --heal least_squares"
)


def products(weights: Projections, facts: Facts) -> dict[str, Array]:
    """`gram` [E, E], float64: inner products of the experts' [W_U; W_G], all entries as one vector. Experts without a gate: of W_U."""
    count = facts.num_experts
    gram = np.zeros((count, count))
    for role in (role for role in weights.roles if role != "down"):
        start = 0
        while start < count:
            block: list[Array] = []
            for place, matrix in enumerate(weights.of(role)):
                if place < start:
                    continue
                flat = matrix.reshape(-1)
                if place == start + len(block) and (not block or (len(block) + 1) * flat.nbytes <= AT_ONCE):
                    block.append(flat)
                found = np.array([float(one @ flat) for one in block])
                gram[start : start + len(block), place] += found
            start += len(block)
    return {"gram": np.triu(gram) + np.triu(gram, 1).T}


@method(
    "merge_moe",
    "Merge rarely used experts into frequently used ones with similar weights, to be healed by least squares",
    "arXiv 2510.14436",
    gives="choice",
    cost="one calibration pass; one read of the weights",
    limits="Float weights only; near chance until its down projections are solved by `heal`; keeps the centre's routing, not the sum of its members'.",
    budgets=("uniform",),
    measure=products,
)
def merge_moe(statistics: LayerStatistics, weights: Mapping[str, Array], facts: Facts, keep_count: int) -> Choice:
    """The `keep_count` most used experts are centres. Every other expert, in descending usage, joins the centre whose [W_U; W_G] has
    the largest cosine with its own (all entries as one vector). With w_j = usage_j / usage of the cluster,

        W_G' = sum_j w_j W_G,j,   W_U' = sum_j w_j W_U,j,   W_D' = Y P^T (P P^T + lambda I)^-1,

    P [neurons, tokens] the merged expert's inputs of the down projection, Y the outputs that it should have. Neurons are not
    re-ordered. A cluster without usage weighs all alike. On a tie the most used centre wins; among equal usages, the lower id.

    The plan has the clusters and weights, and `apply` averages all three matrices: it reads no text, and P depends on the merged layers
    before. **W_D' is solved by `heal` with its method `least_squares`** (or `compress --heal least_squares`); the plan says so in a note.
    Without it the checkpoint is that of a plain average.

    Deviations from the paper: the merged expert keeps the centre's router row. The paper selects experts with the original router and then
    sums the weights of a cluster's members; stock engines have one router row per expert and cannot do this. `heal` fits W_D' to what the
    whole layer should add on the tokens that this router sends to the expert, so Y contains the routing weights, and
    pulls towards the averaged W_D instead of 0, with the lambda that is best on held-out tokens. The paper does not define "most
    similar"; the cosine is our choice. All layers are merged.
    """
    use = usage(statistics)
    gram = weights["gram"]
    if not np.isfinite(gram).all():
        bad = int((~np.isfinite(np.diagonal(gram))).argmax())
        raise UserError(
            f"layer {facts.layer}: the weights of expert {bad} are not finite", "the checkpoint is damaged; download it again"
        )
    similarity = similarity_of(gram)

    def cluster(members: Sequence[int], count: int) -> tuple[list[int], list[int]]:
        ids = list(members)
        return join_dominants(use[ids], similarity[np.ix_(ids, ids)], count)

    how = {"align": "none", "router": "dominant", "log_count": False}
    choice = merged_choice(
        facts, keep_count, cluster, lambda sources: shares(use[sources], "frequency"), how, {"usage": use.tolist()}
    )
    if choice.merge:
        choice.why["warnings"] = [UNSOLVED]
    return choice
