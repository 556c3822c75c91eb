"""MoNE: mixture of novices and experts (Zhang et al., arXiv 2507.00390, ICLR 2026).

Notation: X_j are the tokens routed to expert j, N_j their number, T all tokens, g_j(t) the routing weight that the model applies, f_j(t) in
R^d the raw output. An expert whose output hardly varies is replaced by a constant c_j (a novice): a token routed to it gets g_j(t) c_j.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.methods.base import Array, Facts, mean, method


def constants(statistics: LayerStatistics, *, constant: Literal["gated", "mean"] = "gated") -> Array:
    """The constant of every expert [E, d].

    "mean" is the expert's mean output: sum f_j / N_j. "gated" minimises the error that the layer sees, sum ||g_j (f_j - c_j)||^2: sum g_j^2 f_j / sum g_j^2.
    Zero for an expert without tokens.
    """
    if constant == "mean":
        return mean(statistics.total("output_sum"), statistics.total("selections")[:, None])
    return mean(statistics.total("weighted_sq_output_sum"), statistics.total("weight_sq_sum")[:, None])


@method(
    "mone",
    "Low-variance experts become constants",
    "arXiv 2507.00390 (ICLR 2026)",
    averages=True,
    output_moments=True,
    constants=constants,
    budgets=("uniform", "global"),  # a search masks the dropped experts, and does not replace them
    limits="Engines cannot load the result; transformers and expertsmith can.",
)
def mone(statistics: LayerStatistics, facts: Facts, *, gate: Literal["all", "routed"] = "all") -> Array:
    """phi_j = || standard deviation of f_j over X_j ||_2 * r_j, the standard deviation by dimension (divisor N_j).

    gate=all: r_j = sum of g_j over X_j / T, as in the authors' code. gate=routed: r_j = the mean of g_j over X_j.
    The experts with the lowest phi are not removed: each returns a constant, and the router stays unchanged. constant=gated: sum g_j^2 f_j /
    sum g_j^2, which has the least squared error in the layer's output; constant=mean: sum f_j / N_j. Both are zero for an expert without tokens.

    Deviation from the authors' code: its variance skips each expert's first batch; here it is exact, from float64 sums.
    """
    tokens = statistics.total("selections")
    first = mean(statistics.total("output_sum"), tokens[:, None])
    variance = mean(statistics.total("output_sq_sum"), tokens[:, None]) - first**2
    spread = np.sqrt(np.maximum(variance, 0.0).sum(-1))
    everything = np.broadcast_to(statistics.total("tokens"), tokens.shape)
    result: Array = spread * mean(statistics.total("weight_sum"), everything if gate == "all" else tokens)
    return result
