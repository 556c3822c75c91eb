"""Two models on the same documents: each one's score, the difference, and standard errors that use the pairing.

Both models answer the same documents, and most of a score's variance (hard and easy documents) is common to both. So the standard error of
the difference is that of the per-document differences d, s(d) / sqrt(n), not the root of the sum of two squares, which assumes
independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 200  # of the bootstrap: the standard error is accurate to about 5 %
CLEAR = 2.0  # standard errors; a larger difference is marked


def ratio(sums: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(mean per token, its standard error over sequences) of a quantity, from (tokens n_s, sum d_s) of each sequence s = 1 … S.

    The mean is r = sum d / sum n. The error is sqrt(S / (S - 1) sum_s (d_s - r n_s)^2) / sum n, of the ratio estimator; for equal lengths
    it is that of a mean, and for one sequence 0.
    """
    tokens, count = sum(n for n, _ in sums), len(sums)
    mean = math.fsum(d for _, d in sums) / max(1, tokens)
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(count / (count - 1) * math.fsum((d - mean * n) ** 2 for n, d in sums)) / tokens


def estimate(
    mine: Sequence[Any], theirs: Sequence[Any] | None = None, aggregate: Callable[[list[Any]], float] | None = None
) -> dict[str, Any]:
    """The score of a model over documents, and of a reference over the same documents in the same order.

    If `aggregate` is None, the score is the mean of one number per document: se = s / sqrt(n), s with n - 1. Otherwise the score is
    `aggregate` of all documents' values (perplexity, F1, BLEU, which are no means over documents), and every standard error is the
    deviation over RESAMPLES seeded bootstrap draws of documents, the same draws for both models.

    Returns:
        value, se, errors ("documents" or "bootstrap"); with a reference also reference, reference_se, difference (mine - theirs),
        difference_se and clear (whether the difference is beyond CLEAR standard errors). Standard errors are None for one document.
    """
    columns = [list(mine)] if theirs is None else [list(mine), list(theirs)]
    if aggregate is None:
        numbers = [np.asarray(column, dtype=np.float64) for column in columns]
        if theirs is not None:
            numbers.append(numbers[0] - numbers[1])
        values = [float(column.mean()) for column in numbers]
        errors = [_deviation(column) / math.sqrt(len(column)) for column in numbers]
    else:
        values = [float(aggregate(column)) for column in columns]
        draws = np.random.default_rng(0).integers(len(columns[0]), size=(RESAMPLES, len(columns[0])))
        drawn = [np.array([float(aggregate([column[i] for i in draw])) for draw in draws]) for column in columns]
        if theirs is not None:
            values.append(values[0] - values[1])
            drawn.append(drawn[0] - drawn[1])
        errors = [_deviation(column) if len(columns[0]) > 1 else math.nan for column in drawn]
    made: dict[str, Any] = {"value": finite(values[0]), "se": finite(errors[0])}
    if theirs is not None:
        made |= {
            "reference": finite(values[1]),
            "reference_se": finite(errors[1]),
            "difference": finite(values[2]),
            "difference_se": finite(errors[2]),
            "clear": bool(math.isfinite(errors[2]) and abs(values[2]) > CLEAR * errors[2]),
        }
    return {**made, "errors": "documents" if aggregate is None else "bootstrap"}


def pooled(parts: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The weighted mean of estimates over disjoint sets of documents: sum w x / sum w, with the error sqrt(sum (w se)^2) / sum w."""
    total = sum(weights)
    made: dict[str, Any] = {}
    for key in ("value", "reference", "difference"):
        if key in parts[0]:
            error = f"{key}_se" if key != "value" else "se"
            made[key] = _if_all(
                [part[key] for part in parts], lambda xs: sum(map(math.prod, zip(weights, xs, strict=True))) / total
            )
            made[error] = _if_all(
                [part[error] for part in parts],
                lambda xs: math.sqrt(sum((w * x) ** 2 for w, x in zip(weights, xs, strict=True))) / total,
            )
    if "difference" in made:
        made["clear"] = made["difference_se"] is not None and abs(made["difference"]) > CLEAR * made["difference_se"]
    return {**made, "errors": "parts"}


def finite(number: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON does not have."""
    return number if math.isfinite(number) else None


def _deviation(column: Any) -> float:
    return float(column.std(ddof=1)) if len(column) > 1 else math.nan


def _if_all(numbers: Sequence[float | None], combine: Callable[[list[float]], float]) -> float | None:
    held = [number for number in numbers if number is not None]
    return combine(held) if len(held) == len(numbers) else None
