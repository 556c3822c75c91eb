"""Dynamic measures from the pass that runs every expert: output norms against router scores, similarity of outputs, and the tokens that
each expert is used for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import rankdata

from expertsmith.analysis.similarity import mean_of_pairs
from expertsmith.calibration.all_experts import LayerSample

Array = np.ndarray[Any, Any]
RESAMPLES = 1000
MOST_RANKS = 64  # with more experts, ranks are binned
FEW_TOKENS, TOKENS_SHOWN, PRIOR = 5, 8, 5.0
POINTS = 400  # (norm, score) points per layer for plotting


def bootstrap(values: Array, groups: Array, seed: int = 0) -> dict[str, float | None]:
    """The mean of `values` with a 95 % interval from resampling whole groups (tokens of one text are dependent); none for one group."""
    use = np.isfinite(values)
    if not use.any():
        return {"mean": None, "low": None, "high": None}
    _, place = np.unique(groups[use], return_inverse=True)
    sums, counts = np.bincount(place, values[use]), np.bincount(place)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return {"mean": mean, "low": None, "high": None}
    draw = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draw].sum(1) / counts[draw].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": mean, "low": float(low), "high": float(high)}


def spearman(a: Array, b: Array) -> Array:
    """The rank correlations [T] of every row of a with the same row of b; ties get their average rank. NaN if a row does not vary."""
    ranks = [rankdata(value, axis=1) for value in (a, b)]
    x, y = (value - value.mean(1, keepdims=True) for value in ranks)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    found: Array = np.divide((x * y).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)
    return found


def rank_counts(scores: Array, norms: Array) -> Array:
    """Counts [B, B] over tokens: how often the expert of score rank i (rows) has norm rank j (columns), both ascending (section D2).

    In both, the lower id is first on a tie, so every row and column sums to the number of tokens. With more than 64 experts, ranks are put
    into 16 bins of nearly equal size.
    """
    n = scores.shape[1]
    ranks = [np.argsort(np.argsort(value, axis=1, kind="stable"), axis=1, kind="stable") for value in (scores, norms)]
    bins = n if n <= MOST_RANKS else 16
    first, second = (value * bins // n for value in ranks)
    return np.bincount((first * bins + second).ravel(), minlength=bins * bins).reshape(bins, bins)


def measure_sample(sample: LayerSample, decode: Callable[[int], str] | None = None, seed: int = 0) -> dict[str, Any]:
    """All measures of one layer from its sample (names: `catalogue.SAMPLE`). `decode` turns a token id into text."""
    norms, scores, n = sample.norms.astype(np.float64), sample.scores.astype(np.float64), sample.num_experts
    groups, rows = sample.sequence, np.arange(len(norms))
    top_norm, top_score = norms.argmax(1), scores.argmax(1)
    selected = np.where(sample.selected < n, sample.selected, -1)
    percentile = (rankdata(norms, axis=1) - 1) / (n - 1) if n > 1 else np.full(norms.shape, np.nan)
    real = selected >= 0
    chosen = np.where(real, percentile[rows[:, None], np.maximum(selected, 0)], 0.0).sum(1)
    per_token = np.divide(chosen, real.sum(1), out=np.full(len(norms), np.nan), where=real.any(1))
    similarity = sample.output_angular[:n, :n]
    return {
        "tokens": len(norms),
        "recombined_error": sample.recombined,
        "output_members": sample.members,
        "output_angular": sample.output_angular,
        "output_cosine": sample.output_cosine,
        "output_similarity": mean_of_pairs(similarity),
        "output_similarity_interval": bootstrap(sample.angular_by_token, groups, seed),
        "activation_cosine": sample.activation_cosine,
        "activation_similarity": mean_of_pairs(sample.activation_cosine),
        "norm_score_rho": bootstrap(spearman(norms, scores), groups, seed),
        "largest_norm_top_scored": bootstrap((top_norm == top_score).astype(float), groups, seed),
        "largest_norm_selected": bootstrap((selected == top_norm[:, None]).any(1).astype(float), groups, seed),
        "chosen_norm_percentile": bootstrap(per_token, groups, seed),
        "rank_counts": rank_counts(scores, norms),
        "mean_norm_all": norms.mean(0),
        "points": _points(norms, scores, selected, seed),
        "loved_tokens": loved_tokens(sample, decode),
    }


def _points(norms: Array, scores: Array, selected: Array, seed: int) -> dict[str, Any]:
    """A seeded sample of (token, expert) pairs for plotting; norms are relative to the token's mean norm."""
    tokens, n = norms.shape
    flat = np.sort(np.random.default_rng(seed).permutation(tokens * n)[:POINTS])
    token, expert = np.divmod(flat, n)
    mean = norms.mean(1, keepdims=True)
    relative = np.divide(norms, mean, out=np.ones_like(norms), where=mean > 0)
    return {
        "expert": expert,
        "score": scores[token, expert],
        "relative_norm": relative[token, expert],
        "selected": (selected[token] == expert[:, None]).any(1).astype(int),
    }


def loved_tokens(sample: LayerSample, decode: Callable[[int], str] | None) -> list[list[dict[str, Any]]]:
    """For every expert, the token ids routed to it most often relative to its usual rate, among those seen at least 5 times.

    For a token id with c occurrences, r of them routed to expert e, and the expert's rate p over all tokens:
    lift = ((r + 5 p) / (c + 5)) / p. So rare tokens need a larger share.
    """
    often = sample.token_counts >= FEW_TOKENS
    ids, counts, routed = sample.token_ids[often], sample.token_counts[often], sample.routed_counts[often]
    total = int(sample.token_counts.sum())
    found: list[list[dict[str, Any]]] = []
    for expert in range(sample.num_experts):
        rate = sample.routed_counts[:, expert].sum() / total if total else 0.0
        if not rate or not len(ids):
            found.append([])
            continue
        lift = (routed[:, expert] + PRIOR * rate) / (counts + PRIOR) / rate
        order = [place for place in np.argsort(-lift, kind="stable")[:TOKENS_SHOWN] if lift[place] > 1]
        found.append(
            [
                {
                    "token": int(ids[place]),
                    **({"text": decode(int(ids[place]))} if decode else {}),
                    "seen": int(counts[place]),
                    "routed": float(routed[place, expert] / counts[place]),
                    "lift": float(lift[place]),
                }
                for place in order
            ]
        )
    return found
