"""Similarity of experts: the mathematics of "A Closer Look into Mixture-of-Experts" (arXiv 2406.18219), numbers in, numbers out.

Callers accumulate Gram matrices, and cosines are computed from these, so two experts need not be in memory at once. A zero vector has no
direction: its cosines are NaN, also with itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau

Array = np.ndarray[Any, Any]
PERMUTATIONS = 999
AT_ONCE = 2**22  # entries of permuted similarities in memory at once
SAME = 1e-6  # two experts whose cosine is this close to 1 are copies of each other


def cosine(gram: Array) -> Array:
    """The cosines [n, n] from the Gram matrix of n vectors. The diagonal is exactly 1, and values are clipped to [-1, 1]."""
    square = np.diagonal(gram).astype(np.float64)
    norms = np.sqrt(np.where(square > 0, square, np.nan))
    found: Array = np.clip(gram / np.outer(norms, norms), -1, 1)
    np.fill_diagonal(found, np.where(square > 0, 1.0, np.nan))
    return found


def angular(cosines: Array) -> Array:
    """1 - arccos(cos) / pi: 1 for the same direction, 1/2 for orthogonal vectors, 0 for opposite ones."""
    found: Array = 1 - np.arccos(np.clip(cosines, -1, 1)) / np.pi
    return found


def pairs_of(matrix: Array) -> Array:
    """The strict lower triangle of [n, n], row by row: one entry per pair."""
    found: Array = matrix[np.tril_indices(len(matrix), -1)]
    return found


def mean_of_pairs(matrix: Array, copies: Array | None = None) -> float | None:
    """Mean over pairs of different experts, without pairs that have no value and without `copies` (True if two experts are the same).
    None if no pair is left."""
    values = pairs_of(matrix)
    use = np.isfinite(values) if copies is None else np.isfinite(values) & ~pairs_of(copies)
    return float(values[use].mean()) if use.any() else None


@dataclass(frozen=True)
class Matching:
    """Neurons of one expert matched with those of another.

    `partner` [m]: the matched neuron of the other expert. `matched` and `unmatched`: cosine of the flattened neurons with and without
    re-ordering. `mean`: mean cosine of partners. `tau`: Kendall's tau between the order of partners and the original order (1: already
    aligned, near 0: the order carries no information).
    """

    partner: Array
    matched: float
    unmatched: float
    mean: float
    tau: float


def match(products: Array, norms_a: Array, norms_b: Array, places: Array) -> Matching:
    """Find the best one-to-one partners for m neurons of expert a among the f neurons of expert b (section S3 of the paper's code).

    products [m, f]: inner products of the neurons; `places` [m]: indices of these neurons in a, ascending. The assignment maximises the sum
    of cosines. With m = f this is the authors' measure. With fewer neurons, partners have less competition, so compare values only with a
    null of the same m. Deviation: the authors' up and gate branch does not run (cosine along an axis that does not exist).
    """
    scale = np.outer(norms_a, norms_b)
    cosines = np.divide(products, scale, out=np.zeros_like(scale), where=scale > 0)
    rows, partner = linear_sum_assignment(cosines, maximize=True)
    length = np.sqrt((norms_a[rows] ** 2).sum())

    def flat(columns: Array) -> float:
        other = np.sqrt((norms_b[columns] ** 2).sum())
        return float(products[rows, columns].sum() / (length * other)) if length * other > 0 else float("nan")

    tau = kendalltau(places[rows], partner).statistic if len(rows) > 1 else float("nan")
    return Matching(partner, flat(partner), flat(places[rows]), float(cosines[rows, partner].mean()), float(tau))


def sample_pairs(count: int, limit: int, seed: int) -> list[tuple[int, int]]:
    """All pairs (a, b), a < b, of `count` experts, or a seeded sample of `limit` pairs; sorted by b, so that each b is prepared once."""
    first, second = np.triu_indices(count, 1)
    chosen = np.arange(len(first))
    if len(chosen) > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(len(first), limit, replace=False))
    return sorted(((int(first[i]), int(second[i])) for i in chosen), key=lambda pair: (pair[1], pair[0]))


@dataclass(frozen=True)
class Correlation:
    """Pearson's r between the pair entries of two similarity matrices. `p`: share of label permutations with an r^2 at least as large (the
    identity included); `null`: mean r^2 of the permutations; `null_values`: r^2 of each permutation."""

    r: float
    p: float
    null: float
    null_values: Array

    @property
    def r2(self) -> float:
        """r squared."""
        return self.r * self.r


def correlate(x: Array, ys: list[Array], seed: int = 0, permutations: int = PERMUTATIONS) -> list[Correlation | None]:
    """Correlate `x` [n, n] with each of `ys` over expert pairs. For the permutation null, the expert labels of x are shuffled.

    Pairs without a value in x or y are left out of the observed r (and filled with the mean for the permutations). The result is None if
    fewer than three pairs have values, or one side does not vary.
    """
    n = len(x)
    first, second = np.tril_indices(n, -1)
    full = x.astype(np.float64).copy()
    full[~np.isfinite(full)] = np.nanmean(pairs_of(full)) if np.isfinite(pairs_of(full)).any() else 0.0
    targets, observed = [], []
    for y in ys:
        a, b = pairs_of(x), pairs_of(y)
        use = np.isfinite(a) & np.isfinite(b)
        steady = use.sum() < 3 or np.ptp(a[use]) == 0 or np.ptp(b[use]) == 0
        observed.append(None if steady else float(np.corrcoef(a[use], b[use])[0, 1]))
        filled = np.where(np.isfinite(b), b, b[use].mean() if use.any() else 0.0)
        centred = filled - filled.mean()
        targets.append(centred / (np.linalg.norm(centred) or 1.0))
    if n < 3 or all(value is None for value in observed):
        return [None] * len(ys)
    random = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // max(1, len(first)))
    squares: list[Array] = []
    left = permutations
    while left > 0:
        orders = random.permuted(np.tile(np.arange(n), (min(rows, left), 1)), axis=1)
        left -= len(orders)
        shuffled = full[orders[:, first], orders[:, second]]
        shuffled -= shuffled.mean(1, keepdims=True)
        length = np.linalg.norm(shuffled, axis=1, keepdims=True)
        squares.append((shuffled @ np.stack(targets, 1) / np.where(length > 0, length, 1.0)) ** 2)
    null = np.concatenate(squares)
    found: list[Correlation | None] = []
    for place, r in enumerate(observed):
        if r is None:
            found.append(None)
            continue
        values = null[:, place]
        p = (1 + int((values >= r * r - 1e-12).sum())) / (1 + len(values))
        found.append(Correlation(r, p, float(values.mean()), values))
    return found


def effective_rank(gram: Array) -> float:
    """exp(-sum p ln p), p = singular values / their sum (Roy and Vetterli, 2007), from the Gram matrix of the rows; NaN for zeros."""
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram.astype(np.float64)), 0))
    total = values.sum()
    if total <= 0:
        return float("nan")
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def principal(gram: Array, components: int = 2) -> tuple[Array, list[float]]:
    """(coordinates [n, components], each component's share of the variance) from the Gram matrix of n centred vectors.

    The same as a full SVD of the vectors, up to sign; the entry of largest magnitude in each component is made positive.
    """
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    order = np.argsort(values)[::-1][:components]
    kept = np.maximum(values[order], 0)
    coordinates = vectors[:, order] * np.sqrt(kept)
    for column in range(coordinates.shape[1]):
        if coordinates[np.abs(coordinates[:, column]).argmax(), column] < 0:
            coordinates[:, column] *= -1
    total = np.maximum(values, 0).sum()
    return coordinates, [float(value / total) if total > 0 else 0.0 for value in kept]
