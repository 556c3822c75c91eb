"""Baseline criteria: random, token counts, routing weights, output norms.

Notation (frontier card, section 1): X_j are the tokens routed to expert j, N_j their number, g_j(t) the routing weight that the model
applies, f_j(t) the raw output. The family is S_j(b, a, c) = N_j^(-b) * sum over X_j of g_j(t)^a * ||f_j(t)||^c.
An expert without tokens scores 0.
"""

from __future__ import annotations

import numpy as np

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.methods.base import Array, Facts, Natural, mean, method


@method(
    "random",
    "Random choice: the baseline",
    "-",
    reads="nothing",
    limits="Ignores the model: use the mean of several seeds.",
)
def random(facts: Facts, *, seed: Natural = 0) -> Array:
    """Uniform random saliency, drawn per layer from (seed, layer). Data-free."""
    return np.random.default_rng([seed, facts.layer]).random(facts.num_experts)


@method(
    "frequency",
    "Selection frequency",
    "MoE pruning baseline; hard count of SEER-MoE, arXiv 2404.05089",
    limits="Ignores routing weights: a rare expert may have large ones.",
)
def frequency(statistics: LayerStatistics, facts: Facts) -> Array:
    """N_j: the number of tokens routed to the expert. (b, a, c) = (0, 0, 0)."""
    return statistics.total("selections").astype(np.float64)


@method(
    "router_score",
    "Summed routing weights",
    "soft count of SEER-MoE, arXiv 2404.05089",
    limits="Ignores the experts' outputs.",
)
def router_score(statistics: LayerStatistics, facts: Facts) -> Array:
    """Sum of g_j over the tokens routed to the expert. (0, 1, 0)."""
    return statistics.total("weight_sum")


@method("ean", "Expert activation norm", "REAP repository, arXiv 2510.13999", limits="Sums grow with frequency.")
def ean(statistics: LayerStatistics, facts: Facts, *, weighted: bool = False) -> Array:
    """Sum of ||f_j|| over routed tokens, (0, 0, 1); with weighted=true the sum of g_j ||f_j||, (0, 1, 1)."""
    return statistics.total("weighted_norm_sum" if weighted else "norm_sum")


@method("man", "Mean activation norm", "arXiv 2606.15716", averages=True, limits="Noisy for experts with few tokens.")
def man(statistics: LayerStatistics, facts: Facts) -> Array:
    """Mean of ||f_j|| over routed tokens, (1, 0, 1), for task-agnostic pruning. Noisy if N_j < 30."""
    return mean(statistics.total("norm_sum"), statistics.total("selections"))


@method("msan", "Mean squared activation norm", "arXiv 2606.15716", averages=True, limits="Noisy for experts with few tokens.")
def msan(statistics: LayerStatistics, facts: Facts) -> Array:
    """Mean of ||f_j||^2 over routed tokens, (1, 0, 2), for task-agnostic pruning. Noisy if N_j < 30."""
    return mean(statistics.total("norm_sq_sum"), statistics.total("selections"))
