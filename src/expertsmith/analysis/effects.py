"""How large a correlation is, how sure it is, and the word for both.

Sizes are those of Cohen, "Statistical Power Analysis for the Behavioral Sciences" (2nd edition, 1988), for correlations: below 0.1 negligible,
below 0.3 weak, below 0.5 moderate, from there on strong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t

LEAST = 0.1
SIZES = ((LEAST, "negligible"), (0.3, "weak"), (0.5, "moderate"))
NORMAL = 1.96  # 95 %
NEARLY_ONE = 1 - 1e-9


@dataclass(frozen=True)
class Effect:
    """A correlation in the direction of a claim (positive: as claimed).

    low, high: its 95 % interval, None where there is none; agree: places (layers, or steps between them) of the claimed sign, among `of`.
    """

    value: float
    low: float | None
    high: float | None
    agree: int
    of: int

    @property
    def size(self) -> str:
        """Cohen's word for its magnitude."""
        return next((word for limit, word in SIZES if abs(self.value) < limit), "strong")

    @property
    def word(self) -> str:
        """What may be said of the claim.

        "supported": the interval lies above 0, the effect is at least weak, and more than half of the places have its sign. "weak": the interval
        lies above 0, but the effect is negligible, or the effect is not, but the interval reaches 0. "mixed": the latter where places disagree
        in sign, or half of them at most have that of the effect. "not supported": the effect is not positive, or negligible with an interval that reaches 0.
        """
        clear, large = self.low is not None and self.low > 0, abs(self.value) >= LEAST
        if self.value <= 0 or not (clear or large):
            return "not supported"
        if clear and large:
            return "supported" if 2 * self.agree > self.of else "mixed"
        return "weak" if clear or self.agree == self.of else "mixed"

    def to_json(self) -> dict[str, Any]:
        """As `measures.json` has it."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "size": self.size,
            "agree": self.agree,
            "of": self.of,
        }


def said(value: float, effect: Effect, sign: int = 1) -> str:
    """A correlation with its size and interval, as the measure has its sign: "+0.12, weak (95 % interval -0.06 to +0.31)"."""
    if effect.low is None or effect.high is None:
        return f"{value:+.2f}, {effect.size} (no interval)"
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{value:+.2f}, {effect.size} (95 % interval {low:+.2f} to {high:+.2f})"


def over_layers(values: Sequence[float], alone: tuple[float, float] | None) -> Effect:
    """Mean of the correlations of several layers. Interval: Student's t over the layers' Fisher z (arctanh r), so it says how far the layers agree.

    Args:
        alone: the interval of a single layer's value, where there is but one.
    """
    held = np.asarray(values, dtype=float)
    mean, low, high = float(held.mean()), None, None
    if len(held) > 1:
        z = np.arctanh(np.clip(held, -NEARLY_ONE, NEARLY_ONE))
        half = float(t.ppf(0.975, len(z) - 1) * z.std(ddof=1) / np.sqrt(len(z)))
        low, high = float(np.tanh(z.mean() - half)), float(np.tanh(z.mean() + half))
    elif alone is not None:
        low, high = alone
    return Effect(mean, low, high, int((held > 0).sum()), len(held))


def of_experts(r: float, experts: int) -> tuple[float, float] | None:
    """Fisher's interval of a correlation over the pairs of `experts` experts: tanh(arctanh r ± 1.96 / sqrt(E - 3)). It counts experts, for pairs that
    share one are not independent; None below four."""
    return _fisher(r, 1 / np.sqrt(experts - 3)) if experts > 3 else None


def of_ranks(rho: float, places: int) -> tuple[float, float] | None:
    """Interval of Spearman's rho of `places` pairs: arctanh rho ± 1.96 sqrt(1.06 / (n - 3)) (Fieller, Hartley and Pearson, 1957); None below four.

    A perfect order is taken half-way to the next best, 1 - 6 / (n (n² - 1)): a few places fall into it by chance.
    """
    if places < 4:
        return None
    most = 1 - 6 / (places * (places**2 - 1))
    return _fisher(float(np.clip(rho, -most, most)), np.sqrt(1.06 / (places - 3)))


def _fisher(r: float, error: float) -> tuple[float, float]:
    z = np.arctanh(np.clip(r, -NEARLY_ONE, NEARLY_ONE))
    return float(np.tanh(z - NORMAL * error)), float(np.tanh(z + NORMAL * error))
