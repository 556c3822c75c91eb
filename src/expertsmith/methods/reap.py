"""REAP: router-weighted expert activation pruning (Lasby et al., arXiv 2510.13999, ICLR 2026)."""

from __future__ import annotations

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.methods.base import Array, Facts, mean, method


@method(
    "reap",
    "Router-weighted expert activation",
    "arXiv 2510.13999 (ICLR 2026)",
    averages=True,
    limits="Keeps rarely used experts with large outputs from domains outside the calibration; noisy for experts with few tokens.",
)
def reap(statistics: LayerStatistics, facts: Facts) -> Array:
    """Mean of g_j ||f_j|| over the tokens routed to the expert, (1, 1, 1); the lower id is pruned first on a tie.

    Deviation from the authors' code: g_j is the weight that the model's own router returned. The authors recompute
    softmax(logits) for every family, which gives wrong weights for sigmoid routers, and wrong tokens for routers with a
    selection bias or expert_groups.
    """
    return mean(statistics.total("weighted_norm_sum"), statistics.total("selections"))
