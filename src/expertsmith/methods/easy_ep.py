"""EASY-EP: domain-specific pruning from a few demonstrations (Dong et al., arXiv 2504.06792, NeurIPS 2025)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

import numpy as np

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.methods.base import Array, Facts, Natural, Positive, method


@method(
    "easy_ep",
    "Domain experts from a few demonstrations",
    "arXiv 2504.06792 (NeurIPS 2025)",
    ties="keep_lower",
    limits="Keeps the experts that the demonstrations use, so other domains get worse.",
)
def easy_ep(
    statistics: LayerStatistics,
    facts: Facts,
    *,
    demonstrations: Literal["all", "random", "longest"] = "all",
    count: Positive = 25,
    seed: Natural = 42,
) -> Array:
    """S_j = sum over tokens of g_j ||f_j|| s, with s = max(0, 1 - cos(x, x + r)). x is the token's residual stream, r the routed output
    without shared experts. On a tie the lower id is kept.

    With several domains D, S_j = sum over D of S_D,j / sum_i S_D,i (section "mixed-domain"), so all domains have equal weight.

    demonstrations: "all" sequences of a domain, "random" (the paper: `count` at random) or "longest" (the authors' code: the `count`
    longest; ties by position). Deviation: length is counted in tokens; theirs in characters of the JSON line.
    """
    tables = {}
    for domain, entry in statistics.domains.items():
        by_sequence = entry["easy_ep_by_sequence"].astype(np.float64)
        chosen = _demonstrations(facts.sequence_lengths[domain], demonstrations, count, f"{seed}/{domain}")
        tables[domain] = entry["easy_ep"] if chosen is None else by_sequence[chosen].sum(0)
    return mix(tables)


def mix(tables: Mapping[str, Array]) -> Array:
    """Combine domains: divide each domain's sums by their total and add them; a domain of total 0 adds nothing. One domain is unchanged."""
    if len(tables) == 1:
        return next(iter(tables.values()))
    mixed: Array = np.sum([table / table.sum() if table.sum() > 0 else table for table in tables.values()], axis=0)
    return mixed


def _demonstrations(lengths: list[int], how: str, count: int, seed: str) -> list[int] | None:
    if how == "all" or count >= len(lengths):
        return None
    if how == "random":
        return sorted(random.Random(seed).sample(range(len(lengths)), count))
    return sorted(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[:count])
